-- The tables of revision e1a70c5b0001 in SQLite, as they were published. Never changed: later migrations start here.
CREATE TABLE alembic_version_events (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_events_pkc PRIMARY KEY (version_num)
);
CREATE TABLE event_wait (
    dag_id VARCHAR(250) NOT NULL,
    task_id VARCHAR(250) NOT NULL,
    run_id VARCHAR(250) NOT NULL,
    map_index INTEGER NOT NULL,
    place INTEGER NOT NULL,
    listener VARCHAR(250),
    call TEXT,
    arguments BLOB,
    address BLOB,
    generation INTEGER NOT NULL,
    holder VARCHAR(250),
    since TIMESTAMP,
    run_start TIMESTAMP,
    deadline TIMESTAMP,
    clears INTEGER NOT NULL,
    phase VARCHAR(20),
    event TEXT,
    record_id VARCHAR(40),
    record_clears INTEGER,
    recorded_after VARCHAR(40),
    lost VARCHAR(40),
    recorded_at TIMESTAMP,
    committed_at TIMESTAMP,
    delivered_at TIMESTAMP,
    finished_by INTEGER,
    sent_by VARCHAR(250),
    reason TEXT,
    expires TIMESTAMP,
    receipt TEXT,
    wanted INTEGER,
    PRIMARY KEY (dag_id, task_id, run_id, map_index, place),
    CONSTRAINT event_wait_task_instance_fkey FOREIGN KEY(dag_id, task_id, run_id, map_index) REFERENCES task_instance (dag_id, task_id, run_id, map_index) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE INDEX event_wait_phase ON event_wait (phase);
CREATE INDEX event_wait_address ON event_wait (address);
CREATE TABLE event_taken (
    identity BLOB NOT NULL,
    content BLOB NOT NULL,
    record_id VARCHAR(40) NOT NULL,
    wait TEXT NOT NULL,
    taken_at TIMESTAMP NOT NULL,
    acknowledged_at TIMESTAMP,
    PRIMARY KEY (identity)
);
CREATE INDEX ix_event_taken_record_id ON event_taken (record_id);
CREATE INDEX ix_event_taken_acknowledged_at ON event_taken (acknowledged_at);
CREATE TABLE event_kept (
    id INTEGER NOT NULL,
    address BLOB NOT NULL,
    "key" TEXT NOT NULL,
    event TEXT NOT NULL,
    event_id VARCHAR(40) NOT NULL,
    "to" VARCHAR(10) NOT NULL,
    sent_by VARCHAR(250) NOT NULL,
    dags TEXT,
    reached TEXT NOT NULL,
    kept_at TIMESTAMP NOT NULL,
    expires TIMESTAMP NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT event_kept_event_id_key UNIQUE (event_id)
);
CREATE INDEX ix_event_kept_address ON event_kept (address);
CREATE INDEX ix_event_kept_expires ON event_kept (expires);
CREATE TABLE event_sent (
    identity BLOB NOT NULL,
    content BLOB NOT NULL,
    receipt TEXT NOT NULL,
    expires TIMESTAMP NOT NULL,
    PRIMARY KEY (identity)
);
CREATE INDEX ix_event_sent_expires ON event_sent (expires);
INSERT INTO alembic_version_events (version_num) VALUES ('e1a70c5b0001');
INSERT INTO event_wait (
    dag_id, task_id, run_id, map_index, place, listener, "call", arguments, address, generation, holder, since, run_start,
    deadline, clears, phase, event, record_id, record_clears, recorded_after, lost, recorded_at, committed_at, delivered_at,
    finished_by, sent_by, reason, expires, receipt, wanted
) VALUES (
    'shop', 'wait', 'golden', -1, 3, 'DirectoryListener', 'DirectoryListener(''größe 🎉'')', X'0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a', X'0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b', 2,
    'host:17', '2026-11-28 12:00:00.000000', '2026-11-28 12:01:00.000000', '2026-11-28 12:02:00.000001', 1, 'committed', '{"n": 1}', 'r2', 1, 'r1', 'r1', '2026-11-28 12:03:00.000000', '2026-11-28 12:04:00.000000',
    '2026-11-28 12:05:00.000000', 2, 'ada', 'why not', '2026-11-28 12:06:00.000000', '{"status": "kept"}', 7
), (
    'shop', 'wait', 'golden', -1, -1, NULL, NULL, NULL, NULL, 0, NULL, NULL, NULL,
    NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL
);
INSERT INTO event_taken (identity, content, record_id, wait, taken_at, acknowledged_at) VALUES
    (X'0101010101010101010101010101010101010101010101010101010101010101', X'0202020202020202020202020202020202020202020202020202020202020202', 'r2', 'shop / golden / wait / -1 / 3', '2026-11-28 12:03:00.000000', '2026-11-28 12:04:00.000000'),
    (X'ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff', X'0000000000000000000000000000000000000000000000000000000000000000', 'r3', 'shop / gone / wait / -1 / -1', '2026-11-28 12:07:00.000000', NULL);
INSERT INTO event_kept (address, "key", event, event_id, "to", sent_by, dags, reached, kept_at, expires) VALUES
    (X'0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b', 'größe 🎉', '{"n": 2}', 'k1', 'all', 'ada', '["shop"]', '[]', '2026-11-28 12:08:00.000000', '2026-11-28 12:09:00.000000');
INSERT INTO event_sent (identity, content, receipt, expires) VALUES
    (X'0303030303030303030303030303030303030303030303030303030303030303', X'0404040404040404040404040404040404040404040404040404040404040404', '{"status": "delivered"}', '2026-11-28 12:10:00.000000');
