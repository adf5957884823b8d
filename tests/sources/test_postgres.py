"""What is peculiar to PostgreSQL: tables and users as they should not be, locks, logins, and questions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from datetime import datetime, timezone

import psycopg
import pytest
from airflow_events.errors import EventLost, EventUndecodable, SourceUnfit, SourceUnreachable
from airflow_events.listeners import serde
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.postgres import PostgresListener, PostgresWatchListener, create_table
from of_postgres import PostgresJsonb, PostgresTable

from deployment import until


@pytest.fixture(scope="module")
def server():
    broker = PostgresJsonb.make()
    if broker is None:
        pytest.skip(PostgresTable.missing)
    yield broker
    broker.stop()


@pytest.fixture
def connect(broker, monkeypatch):
    """Make the Airflow connection another one."""

    def connect(conn_id="source", **changes):
        extra = {"extra": json.dumps(changes.pop("extra"))} if "extra" in changes else {}
        monkeypatch.setenv(
            f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps({**broker.connection(**changes), **extra})
        )

    return connect


@pytest.fixture
def settings(broker):
    """Settings of the server's user, taken back afterwards."""
    yield lambda *them: [broker.run(f"ALTER ROLE airflow SET {setting}") for setting in them]
    broker.run("ALTER ROLE airflow RESET ALL")


async def soon(task, seconds=15):
    return await asyncio.wait_for(asyncio.shield(task), seconds)


async def nothing(task, seconds=1.0):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), seconds)


async def ended(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# One claim for each wait.


def test_triggerers_that_poll_for_the_same_waits_at_once_have_the_same_claims(broker):
    """Each of four threads has a loop and connections of its own, as a triggerer has; a claim takes a while."""
    broker.run(
        "CREATE OR REPLACE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.03);"
        f"RETURN new; END $$; CREATE TRIGGER dawdle BEFORE UPDATE ON {broker.queue} FOR EACH ROW "
        "EXECUTE FUNCTION dawdle()"
    )
    numbers = range(15)
    barrier = threading.Barrier(4)
    found = []

    async def poll_all():
        tasks = []
        for number in numbers:
            with working_for(Wait("dag", f"run{number}", "task")):
                args, kwargs = broker.arguments(poll_interval=1)
                tasks.append(asyncio.create_task(PostgresListener().poll_for_event(*args, **kwargs)))
        found.append(await asyncio.wait_for(asyncio.gather(*tasks), 60))

    def triggerer():
        barrier.wait()
        asyncio.run(poll_all())

    broker.send(*range(5))
    threads = [threading.Thread(target=triggerer) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    broker.send(*range(5, 40))
    for thread in threads:
        thread.join()

    assert len(found) == 4
    assert found[0] == found[1] == found[2] == found[3]
    assert len({event["id"] for event in found[0]}) == len(numbers)
    [(claimed,)] = broker.run(f"SELECT count(*) FROM {broker.queue} WHERE claimed_by IS NOT NULL")
    assert claimed == len(numbers)


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_a_claim_that_is_being_made_elsewhere_for_the_same_wait_is_waited_for(broker, waits, end):
    broker.send("a", "b")
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(
            f"UPDATE {broker.queue} SET claimed_by = 'dag/run0/task/-1', claimed_at = now() "
            f"WHERE id = (SELECT max(id) FROM {broker.queue})"
        )
        task = waits.poll()
        await nothing(task)  # it would take "a", and may not know yet
        other.execute(end)
    event = await soon(task)
    assert event["value"] == ("b" if end == "COMMIT" else "a")
    assert broker.run(f"SELECT count(*) FROM {broker.queue} WHERE claimed_by IS NOT NULL") == [(1,)]


async def test_a_claim_made_by_another_triggerer_is_found_beside_waits_that_find_nothing(broker, waits):
    first, second = waits.poll(0, poll_interval=2), waits.poll(1, poll_interval=2)
    await nothing(second)
    broker.run(f"ALTER TABLE {broker.queue} DISABLE TRIGGER ALL")
    broker.run(
        f"INSERT INTO {broker.queue} (value, claimed_by, claimed_at) VALUES ('1', 'dag/run1/task/-1', now())"
    )
    assert (await soon(second))["value"] == 1
    assert not first.done()


async def test_a_row_that_somebody_has_locked_is_passed_over_until_it_is_free(broker, waits):
    broker.send("a", "b")
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT FROM {broker.queue} ORDER BY id LIMIT 1 FOR UPDATE")
        assert (await soon(waits.poll(0)))["value"] == "b"
        task = waits.poll(1, poll_interval=1)
        await nothing(task)
        other.execute("ROLLBACK")
    assert (await soon(task))["value"] == "a"


async def test_a_lock_on_the_claim_of_one_wait_does_not_stop_the_others(broker, waits, caplog):
    first = waits.poll(0)
    broker.send("a")
    event = await soon(first)
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT FROM {broker.queue} FOR UPDATE")
        stuck, free = waits.poll(0), waits.poll(1)
        await nothing(stuck)
        broker.send("b")
        assert (await soon(free))["value"] == "b"
        assert not stuck.done()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await waits.commit(event)  # which is tried again by whoever called it
        assert broker.unacknowledged() == 2
    assert await soon(stuck) == event
    await waits.commit(event)
    assert "is tried again" in caplog.text


async def test_the_claim_is_renewed_by_another_poll_of_the_wait(broker, waits):
    broker.send("a")
    event = await soon(waits.poll(0))
    [(before,)] = broker.run(f"SELECT claimed_at FROM {broker.queue}")
    assert await soon(waits.poll(0)) == event
    [(after,)] = broker.run(f"SELECT claimed_at FROM {broker.queue}")
    assert after > before


async def test_waits_with_other_timeouts_are_not_held_up_by_one_that_finds_nothing(broker, waits):
    broker.send("a")
    await soon(waits.poll(0))
    broker.run(f"UPDATE {broker.queue} SET claimed_at = now() - interval '100 s'")
    patient = waits.poll(1, claim_timeout=1000)
    await nothing(patient, 0.5)
    assert (await soon(waits.poll(2, claim_timeout=10)))["value"] == "a"
    assert not patient.done()


async def test_a_row_that_is_gone_or_was_given_away_by_hand_is_lost(broker, waits):
    broker.send("a", "b", "c")
    events = [await soon(waits.poll(number)) for number in range(3)]
    broker.run(f"DELETE FROM {broker.queue} WHERE id = %s", events[0]["id"])
    with pytest.raises(EventLost, match=r"nobody \(it was deleted\)"):
        await waits.commit(events[0], 0)
    broker.run(f"UPDATE {broker.queue} SET claimed_by = NULL WHERE id = %s", events[1]["id"])
    with pytest.raises(EventLost, match=r"nobody \(its claim was taken back\)"):
        await waits.commit(events[1], 1)
    broker.run(f"UPDATE {broker.queue} SET committed_by = 'me' WHERE id = %s", events[2]["id"])
    with pytest.raises(EventLost, match="held by me"):
        await waits.commit(events[2], 2)
    assert (await soon(waits.poll(2)))["value"] == "b"  # its claim on "c" stands in nobody's way


async def test_a_wait_that_has_committed_takes_another_row_if_it_waits_anew(broker, waits):
    broker.send("a", "b")
    first = await soon(waits.poll(0))
    await waits.commit(first)
    second = await soon(waits.poll(0))
    assert second["value"] == "b"
    await waits.release(first)  # not that which it has now
    assert broker.run(f"SELECT claimed_by FROM {broker.queue} WHERE committed_by IS NULL") == [
        ("dag/run0/task/-1",)
    ]
    assert await soon(waits.poll(0)) == second
    await waits.commit(second)
    await waits.commit(first)
    assert broker.unacknowledged() == 0


async def test_defaults_of_the_user_do_not_weaken_a_commit(broker, waits, settings):
    settings("synchronous_commit = off", "default_transaction_isolation = 'repeatable read'")
    settings("default_transaction_read_only = on")
    broker.run(
        "CREATE TABLE IF NOT EXISTS seen (sync text, isolation text);"
        "CREATE OR REPLACE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES "
        "(current_setting('synchronous_commit'), current_setting('transaction_isolation')); RETURN NULL; END $$;"
        f"CREATE TRIGGER see AFTER UPDATE ON {broker.queue} FOR EACH STATEMENT EXECUTE FUNCTION see();"
        f"INSERT INTO {broker.queue} (value) VALUES ('1')"
    )
    event = await soon(waits.poll())
    await waits.commit(event)
    assert broker.unacknowledged() == 0
    seen = broker.run("SELECT DISTINCT * FROM seen")
    assert seen == [("on", "read committed")]


# Being told, and looking.


async def test_a_notification_wakes_long_before_the_next_look(broker, waits):
    task = waits.poll(poll_interval=600)
    await nothing(task)
    began = time.monotonic()
    broker.send("a")
    await soon(task)
    assert time.monotonic() - began < 2


async def test_without_notifications_the_next_look_finds_it(broker, waits):
    deaf = waits.poll(0, channel=None, poll_interval=2)
    other_channel = waits.poll(1, channel="Another \"channel\" of 'ours'", poll_interval=600)
    await nothing(deaf)
    broker.send("a")
    assert (await soon(deaf))["value"] == "a"
    broker.send("b")
    await nothing(other_channel)
    broker.run("SELECT pg_notify(%s, '')", "Another \"channel\" of 'ours'")
    assert (await soon(other_channel))["value"] == "b"


async def test_notifications_of_another_table_are_not_looked_after(broker, waits, settings):
    settings("log_statement = 'all'")
    task = waits.poll(poll_interval=600)
    await nothing(task)
    log = broker.server.folder / "postgres.log"
    before = log.read_text().count("SKIP LOCKED")
    assert before > 0
    broker.run("SELECT pg_notify('airflow_events', 'public.another')")
    await nothing(task)
    assert log.read_text().count("SKIP LOCKED") == before
    broker.run(f"SELECT pg_notify('airflow_events', 'public.{broker.queue}')")
    await nothing(task)
    assert log.read_text().count("SKIP LOCKED") == before + 1


async def test_a_release_is_notified(broker, waits):
    event = waits.poll(0)
    broker.send("a")
    event = await soon(event)
    other = waits.poll(1, poll_interval=600)
    await nothing(other)
    await waits.release(event, columns={}, channel="airflow_events")
    await soon(other, 2)
    await waits.release(None, 1)
    assert broker.run(f"SELECT claimed_by FROM {broker.queue}") == [(None,)]


# Tables of other forms.


async def test_a_table_of_other_names(broker, waits):
    table = 'My.Out"box; DROP'
    names = {"id": "Nr.", "value": 'pay"load', "created_at": None, "claimed_by": "c b", "committed_by": "select"}
    broker.run(
        'CREATE SCHEMA IF NOT EXISTS "My"; DROP TABLE IF EXISTS "My"."Out""box; DROP";'
        'CREATE TABLE "My"."Out""box; DROP" ("Nr." uuid PRIMARY KEY DEFAULT gen_random_uuid(), "pay""load" text,'
        '"c b" varchar, claimed_at timestamptz, "select" text, committed_at timestamptz);'
        'CREATE UNIQUE INDEX ON "My"."Out""box; DROP" ("c b") WHERE "select" IS NULL;'
        'INSERT INTO "My"."Out""box; DROP" ("pay""load") VALUES (\'{"a": 1}\')'
    )
    broker.queue = table
    event = await soon(waits.poll(columns=names))
    serde.check(event)
    assert event["value"] == {"a": 1}
    assert event["timestamp"] is None
    assert await soon(waits.poll(columns=names)) == event
    with pytest.raises(EventLost):
        await waits.commit(event, 1)
    await waits.release(event, columns=names)
    assert await soon(waits.poll(1, columns=names)) == event
    await waits.commit(event, 1)
    await waits.commit(event, 1)
    assert broker.run('SELECT "c b", "select" FROM "My"."Out""box; DROP"') == [("dag/run1/task/-1",) * 2]


def test_create_table_takes_other_names(broker):
    columns = {"value": "Payload", "claimed_by": "taken by"}
    broker.run('DROP SCHEMA IF EXISTS "S p" CASCADE; CREATE SCHEMA "S p"')
    broker.run(create_table("S p.T", columns=columns, value_type="text", channel="it's"))
    with broker.server.connect() as other:
        other.execute('LISTEN "it\'s"')
        broker.run('INSERT INTO "S p"."T" ("Payload") VALUES (\'x\')')
        [notification] = other.notifies(timeout=5, stop_after=1)
    assert notification.payload == "S p.T"
    with pytest.raises(ValueError, match="'xml'"):
        create_table("t", value_type="xml")


@pytest.mark.parametrize(
    ("type", "values", "stored", "value"),
    [
        ("json", "json", '{"b": 1, "a": [1.5, null]}', {"b": 1, "a": [1.5, None]}),
        ("jsonb", "text", '{"b":  1}', '{"b": 1}'),
        ("jsonb", "bytes", "1", "MQ=="),
        ("text", "json", "[true]", [True]),
        ("text", "text", "ä'\\", "ä'\\"),
        ("varchar(10)", "text", "12", "12"),
        ("bytea", "text", "\\xc3a4", "ä"),
        ("bytea", "bytes", "\\x00ff", "AP8="),
        ("jsonb", "json", None, None),
    ],
)
async def test_values(broker, waits, type, values, stored, value):
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE {type} USING NULL")
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES (%s)", stored)
    assert (await soon(waits.poll(values=values)))["value"] == value


async def test_a_text_that_is_no_json_is_refused_and_free_again(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE text")
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('{{no json')")
    with pytest.raises(EventUndecodable, match="the row 1 of the table"):
        await soon(waits.poll())
    assert broker.run(f"SELECT claimed_by, committed_by FROM {broker.queue}") == [(None, None)]


@pytest.mark.parametrize("type", ["text", "uuid", "smallint"])
async def test_ids(broker, waits, type):
    one = {"text": "x'1", "uuid": "6f1c1cf3-0000-4000-8000-000000000001", "smallint": 7}[type]
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN id DROP IDENTITY")
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN id TYPE {type} USING NULL")
    broker.run(f"INSERT INTO {broker.queue} (id, value) VALUES (%s, '1')", one)
    event = await soon(waits.poll())
    serde.check(event)
    assert event["id"] == one
    await waits.commit(event)
    await waits.commit(event)
    assert broker.unacknowledged() == 0


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 00:00 BC", "20000-01-01"])
async def test_moments_that_python_has_not(broker, waits, moment):
    broker.run(f"INSERT INTO {broker.queue} (value, created_at) VALUES ('1', %s)", moment)
    event = await soon(waits.poll())
    assert event["timestamp"] is None
    await waits.commit(event)


async def test_the_time_stamp_is_in_utc_whatever_the_users_zone(broker, waits, settings):
    settings("timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'")
    broker.run(f"INSERT INTO {broker.queue} (value, created_at) VALUES ('1', '2026-03-04T05:06:07.5+00')")
    event = await soon(waits.poll())
    assert event["timestamp"] == datetime(2026, 3, 4, 5, 6, 7, 500000, timezone.utc)
    assert event["timestamp"].tzinfo is timezone.utc


async def test_the_order_is_to_be_chosen(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ADD COLUMN priority int")
    for value, priority in enumerate([1, 3, 3, 2]):
        broker.run(f"INSERT INTO {broker.queue} (value, priority) VALUES (to_jsonb(%s::int), %s)", value, priority)
    order = {"order_by": ["-priority", "id"]}
    assert [(await soon(waits.poll(number, **order)))["value"] for number in range(4)] == [1, 2, 3, 0]


# What is refused.

_ALTER = "ALTER TABLE {table} "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE {table}", r"there is no such table.*create_table\('queue"),
        (_ALTER + "DROP COLUMN committed_at", "it has no column 'committed_at', only 'id', 'value', 'created_at'"),
        (_ALTER + "ALTER COLUMN claimed_at TYPE timestamp", "'claimed_at' is of type timestamp without time zone"),
        (_ALTER + "ALTER COLUMN value TYPE int USING NULL", "'value' is of type integer; json or"),
        (
            _ALTER + "ALTER COLUMN id DROP IDENTITY;" + _ALTER + "ALTER COLUMN id TYPE numeric",
            "'id' is of type numeric",
        ),
        (_ALTER + "ALTER COLUMN claimed_by SET NOT NULL", "'claimed_by' is NOT NULL"),
        (_ALTER + "ALTER COLUMN committed_by TYPE varchar(20)", "'committed_by' is limited in length"),
        (_ALTER + "DROP CONSTRAINT {table}_pkey", "'id' needs a PRIMARY KEY"),
        ("DROP INDEX {table}_claimed_by_idx", 'CREATE UNIQUE INDEX ON "queue.*WHERE "committed_by" IS NULL'),
        (
            "DROP INDEX {table}_claimed_by_idx; CREATE UNIQUE INDEX ON {table} (claimed_by)",
            "nothing keeps a wait from having two claims",
        ),
        (_ALTER + "SET UNLOGGED", "UNLOGGED"),
        (_ALTER + "RENAME TO {table}_old; CREATE VIEW {table} AS SELECT * FROM {table}_old", "relkind 'v'"),
    ],
)
async def test_a_table_that_would_not_do(broker, waits, change, message):
    broker.run(change.format(table=broker.queue))
    with pytest.raises(SourceUnfit, match=f"(?s)the table '{broker.queue}' of the connection 'source'.*{message}"):
        await soon(waits.poll())


async def test_an_unlogged_table_by_choice(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} SET UNLOGGED")
    broker.send("a")
    await waits.commit(await soon(waits.poll(require_persistence=False)))


async def test_a_table_that_is_made_fit_is_taken_by_those_who_come_later(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} RENAME COLUMN value TO payload")
    with pytest.raises(SourceUnfit):
        await soon(waits.poll(0))
    broker.run(f"ALTER TABLE {broker.queue} RENAME COLUMN payload TO value")
    task = waits.poll(1)
    await nothing(task)
    broker.run(f"DROP TABLE {broker.queue}")
    later = waits.poll(2)
    with pytest.raises(SourceUnfit, match="it was changed while it was in use"):
        await soon(later)


async def test_rights(broker, waits, connect):
    broker.run("DROP ROLE IF EXISTS taker")
    broker.run("CREATE ROLE taker LOGIN")
    connect(login="taker")
    try:
        needed = "UPDATE on 'claimed_by', 'committed_by', 'claimed_at', 'committed_at'"
        with pytest.raises(SourceUnfit, match=f"to SELECT the column 'id'; needed are.*{needed}"):
            await soon(waits.poll())
        broker.run(f"GRANT SELECT ON {broker.queue} TO taker")
        with pytest.raises(SourceUnfit, match="to UPDATE the column 'claimed_by'"):
            await soon(waits.poll())
        ours = "claimed_by, claimed_at, committed_by, committed_at"
        broker.run(f"GRANT UPDATE ({ours}) ON {broker.queue} TO taker")
        broker.send("a")
        event = await soon(waits.poll())  # that is all it takes
        await waits.commit(event)
        broker.run(f"CREATE SCHEMA IF NOT EXISTS closed; DROP TABLE IF EXISTS closed.{broker.queue}")
        broker.run(f"CREATE TABLE closed.{broker.queue} ()")
        broker.queue = f"closed.{broker.queue}"
        with pytest.raises(SourceUnfit, match="may not use it: permission denied for schema closed"):
            await soon(waits.poll())
    finally:
        broker.run("DROP OWNED BY taker; DROP ROLE taker")


async def test_a_standby_is_refused_and_a_primary_that_fails_over_is_waited_for(broker, waits):
    task = waits.poll(0)
    watch = asyncio.create_task(PostgresWatchListener().poll_for_event("SELECT 1", postgres_conn_id="source"))
    await nothing(task)
    assert await soon(watch) == {"?column?": 1}
    broker.server.kill()
    (broker.server.folder / "data" / "standby.signal").touch()
    broker.server.start()
    try:
        assert broker.run("SELECT pg_is_in_recovery()") == [(True,)]
        await nothing(task, 2)
        other = waits.poll(1, poll_interval=5)  # through a hub that has not seen a primary there
        with pytest.raises(SourceUnfit, match=r"in recovery \(a read-only standby\)"):
            await soon(other)
        listener = PostgresWatchListener()
        assert await soon(asyncio.create_task(listener.poll_for_event("SELECT 2 AS n", postgres_conn_id="source")))
        with pytest.raises(SourceUnfit, match="cannot execute LISTEN during recovery"):
            await listener.poll_for_event("SELECT 2", channel="c", postgres_conn_id="source")
    finally:
        broker.run("SELECT pg_promote()")
    broker.send("a")
    assert (await soon(task, 40))["value"] == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"payload": "value"}}, "columns maps 'id', .* not 'payload'"),
        ({"columns": {"value": None}}, "needs a column for 'value'"),
        ({"columns": {"value": "100%"}}, "percent sign"),
        ({"poll_interval": 0}, "poll_interval is a number of seconds above 0, not 0"),
        ({"claim_timeout": -1}, "claim_timeout is a number of seconds above 0, not -1"),
        ({"order_by": "-"}, "order_by is a column"),
        ({"channel": "x" * 64}, "1 to 63 bytes"),
    ],
)
async def test_parameters_that_are_none(waits, changes, message):
    with pytest.raises(ValueError, match=message):
        await soon(waits.poll(**changes))


@pytest.mark.parametrize("table", ["", "a.b.c", ".a", "a."])
async def test_tables_that_are_none(broker, waits, table):
    broker.queue = table
    with pytest.raises(ValueError, match="table is 'table' or"):
        await soon(waits.poll())


async def test_an_order_by_a_column_that_is_not_there(broker, waits):
    with pytest.raises(SourceUnfit, match="it has no column 'priority'"):
        await soon(waits.poll(order_by="-priority"))


# Logins.


async def test_extras(broker, waits, connect):
    broker.run("CREATE SCHEMA IF NOT EXISTS elsewhere; DROP TABLE IF EXISTS elsewhere.found")
    broker.run(create_table("elsewhere.found"))
    broker.queue = "found"
    hook = {"cursor": "dictcursor", "iam": False, "sqlalchemy_query": {}}
    connect(
        extra={**hook, "options": "-c search_path=elsewhere", "application_name": "mine", "sslmode": "disable"}
    )
    task = waits.poll()
    await nothing(task)
    assert broker.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'mine'") == [(1,)]
    broker.run("INSERT INTO elsewhere.found (value) VALUES ('1')")
    await soon(task, 2)  # by a notification, which has the schema's name
    connect(extra={"ssl_mode": "verify-full"})
    with pytest.raises(SourceUnfit, match="'source' has an extra 'ssl_mode', which is no option of libpq"):
        await soon(waits.poll(1))


@pytest.fixture
def guarded(broker):
    """A user who may come in only with a password."""
    rules = broker.server.folder / "data" / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host all guarded all scram-sha-256\n{before}")
    broker.run("DROP ROLE IF EXISTS guarded")
    broker.run("CREATE ROLE guarded SUPERUSER LOGIN PASSWORD 'pa%ss w''ord'")
    broker.run("SELECT pg_reload_conf()")
    yield {"login": "guarded", "password": "pa%ss w'ord"}
    rules.write_text(before)
    broker.run("SELECT pg_reload_conf()")


async def test_a_password_is_used_and_not_told(broker, waits, connect, guarded, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    connect(**guarded)
    broker.send("a")
    event = await soon(waits.poll())
    await waits.commit(event)
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    connect(**{**guarded, "password": "Geheim!"})
    with pytest.raises(SourceUnreachable, match="password authentication failed") as refused:
        await soon(waits.poll(1))
    seen = caplog.text + str(event) + str(refused.value) + repr(refused.value.__cause__)
    assert "Geheim!" not in seen
    assert "w'ord" not in seen


class Tls(threading.Thread):
    """
    Speaks TLS for the server, whose build has none: takes PostgreSQL's request for it, and passes on the rest.

    :ivar seen: how many connections came through it.
    """

    def __init__(self, folder, name, port):
        super().__init__(daemon=True)
        make = ["openssl", "req", "-new", "-x509", "-days", "2", "-nodes", "-newkey", "rsa:2048"]
        key, self.certificate = folder / f"{name}.key", folder / f"{name}.crt"
        about = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        files = ["-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run([*make, *about, *files], check=True, capture_output=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, key)
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.seen = 0

    def run(self):
        while True:
            with contextlib.suppress(ssl.SSLError):
                taken, _ = self._listener.accept()
                assert taken.recv(8) == struct.pack("!ii", 8, 80877103)
                taken.sendall(b"S")
                client = self._context.wrap_socket(taken, server_side=True)
                server = socket.create_connection(("127.0.0.1", self._to))
                self.seen += 1
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="it makes the certificates with openssl")
async def test_tls(broker, waits, connect, guarded, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    proxy, stranger = (Tls(tmp_path, name, broker.server.port) for name in ("localhost", "elsewhere"))
    proxy.start()
    stranger.start()
    broker.send("a")
    there = {**guarded, "host": "localhost", "port": proxy.port}
    trusted = {"sslmode": "verify-full", "sslrootcert": str(proxy.certificate)}
    connect(**there, extra=trusted)
    event = await soon(waits.poll())
    await waits.commit(event)
    assert proxy.seen == 2

    connect(**there, extra={**trusted, "sslrootcert": str(stranger.certificate)})
    with pytest.raises(SourceUnreachable, match="certificate verify failed"):
        await soon(waits.poll(1))
    elsewhere = {"sslmode": "verify-full", "sslrootcert": str(stranger.certificate)}
    connect(**{**there, "port": stranger.port}, extra=elsewhere)
    with pytest.raises(SourceUnreachable, match="does not match host name"):
        await soon(waits.poll(1))
    connect(**guarded, extra={"sslmode": "require"})
    with pytest.raises(SourceUnreachable, match="server does not support SSL"):
        await soon(waits.poll(2))


# Questions.


@pytest.fixture
async def watch(broker):
    tasks = []

    def watch(query, **kwargs):
        poll = PostgresWatchListener().poll_for_event(query, **{"postgres_conn_id": "source", **kwargs})
        with working_for(Wait("dag", "run", "watch")):
            tasks.append(asyncio.create_task(poll))
        return tasks[-1]

    yield watch
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_row_is_waited_for_and_its_types_can_be_stored(broker, watch, settings):
    settings("timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'")
    row = await soon(
        watch(
            """
            SELECT 1::int AS i, 2::bigint AS b, 1.5::float8 AS f, 'nan'::float8 AS nan, 'infinity'::float4 AS inf,
                12.30::numeric AS n, 'NaN'::numeric AS nn, true AS t, NULL AS nothing, 'ä' AS text,
                'v'::varchar AS v,
                '{"a": [1, 2.5, null]}'::jsonb AS j, '"x"'::json AS jj, '\\x00ff'::bytea AS bytes,
                '6f1c1cf3-0000-4000-8000-000000000001'::uuid AS u, '2026-03-04'::date AS d, '05:06'::time AS tm,
                '2026-03-04T05:06:07.5Z'::timestamptz AS at, '2026-03-04 05:06'::timestamp AS local,
                'infinity'::timestamptz AS never, 'infinity'::date AS no_day, '1 day 02:00'::interval AS dur,
                ARRAY[1.50, 2]::numeric[] AS ns, ARRAY[[1, 2], [3, NULL]] AS ints, ARRAY['\\x01'::bytea] AS bs,
                ARRAY['2026-03-04T05:06:07Z'::timestamptz] AS ats, int4range(1, 5) AS r, ROW(1, 'x') AS record,
                '10.0.0.0/8'::cidr AS net, '{"k": 1}'::jsonb -> 'k' AS one, point(1, 2) AS p
            """
        )
    )
    serde.check(row)
    at = datetime(2026, 3, 4, 5, 6, 7, 500000, timezone.utc)
    assert row == {
        "i": 1, "b": 2, "f": 1.5, "nan": "NaN", "inf": "Infinity", "n": "12.30", "nn": "NaN", "t": True,
        "nothing": None, "text": "ä", "v": "v", "j": {"a": [1, 2.5, None]}, "jj": "x", "bytes": "AP8=",
        "u": "6f1c1cf3-0000-4000-8000-000000000001", "d": "2026-03-04", "tm": "05:06:00", "at": at,
        "local": "2026-03-04 05:06:00", "never": "infinity", "no_day": "infinity", "dur": "1 day 02:00:00",
        "ns": ["1.50", "2"], "ints": [[1, 2], [3, None]], "bs": ["AQ=="], "ats": [at.replace(microsecond=0)],
        "r": "[1,5)", "record": "(1,x)", "net": "10.0.0.0/8", "one": 1, "p": "(1,2)",
    }  # fmt: skip


async def test_a_row_that_comes_later_is_seen_by_the_clock_and_by_a_notification(broker, watch):
    query = f"SELECT id, value FROM {broker.queue} WHERE value = %(value)s::jsonb ORDER BY id DESC"
    by_clock = watch(query, parameters={"value": "1"}, interval=1.5)
    told = watch(query, parameters={"value": "2"}, interval=600, channel="airflow_events")
    deaf = watch(query, parameters={"value": "2"}, interval=601)
    other = watch(query, parameters={"value": "3"}, interval=600)
    await nothing(by_clock, 0.5)
    broker.send(1, 2, 2)
    assert (await soon(told, 1))["id"] == 3
    assert await soon(deaf) == await soon(told)  # one question
    assert await soon(by_clock) == {"id": 1, "value": 1}
    await nothing(other, 0.5)
    assert broker.unacknowledged() == 3


async def test_a_new_channel_is_listened_to_before_the_look(broker, watch):
    query = f"SELECT id FROM {broker.queue} WHERE value = '1'"
    first = watch(query, interval=600)
    await nothing(first, 0.5)
    second = watch(query, interval=600, channel="airflow_events")
    await nothing(second, 0.5)
    broker.send(1)
    assert await soon(first, 2) == await soon(second, 2) == {"id": 1}


async def test_one_question_is_asked_once_for_all_and_all_share_a_connection(broker, watch, settings):
    settings("log_statement = 'all'")
    before = broker.clients()
    query = f"SELECT /* marked {broker.queue} */ id FROM {broker.queue} WHERE value = %s::jsonb"
    same = [watch(query, parameters=["1"], interval=600) for _ in range(100)]
    others = [watch(query, parameters=[str(number)], interval=1) for number in range(2, 52)]
    await asyncio.sleep(1.5)
    assert broker.clients() - before == 1
    later = watch(query, parameters=["1"], interval=600)
    await asyncio.sleep(0.5)
    log = (broker.server.folder / "postgres.log").read_text()
    asked = re.findall(rf"marked {broker.queue} .*\n.*DETAIL.*\$1 = '(\d+)'", log)
    assert asked.count("1") == 1
    assert {asked.count(str(number)) for number in range(2, 52)} <= {2, 3}
    broker.send(*range(1, 52))
    assert [(await soon(task))["id"] for task in others] == list(range(2, 52))
    assert not any(task.done() for task in [*same, later])
    sooner = watch(query, parameters=["1"], interval=0.5)
    for task in [*same, later, sooner]:
        assert await soon(task) == {"id": 1}
    until(lambda: broker.clients() == before, "the connection has ended", 10)


async def test_parameters_are_bound(broker, watch):
    hostile = f"x'; DROP TABLE {broker.queue}; --"
    assert await soon(watch("SELECT %s AS s, 5 %% 3 AS rest", parameters=[hostile])) == {"s": hostile, "rest": 2}
    assert await soon(watch("SELECT 5 % 3 AS rest, 'a%s' AS s")) == {"rest": 2, "s": "a%s"}
    assert broker.unacknowledged() == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEKT 1", "syntax error"),
        ("INSERT INTO {0} (value) VALUES ('1') RETURNING id", "syntax error"),
        ("WITH x AS (INSERT INTO {0} (value) VALUES ('1') RETURNING id) SELECT * FROM x", "data-modifying"),
        ("SELECT nextval(pg_get_serial_sequence('{0}', 'id'))", "cannot execute nextval.* in a read-only"),
        ("SELECT 1; COMMIT; INSERT INTO {0} (value) VALUES ('1')", "multiple commands"),
        ("SELECT FROM {0} FOR UPDATE", "read-only"),
        ("SELECT 1 FROM nowhere", '"nowhere" does not exist'),
        ("SELECT 1 / 0", "division by zero"),
        ("SELECT 1 AS a, 2 AS a", "two columns of one name: a, a"),
        ("", "syntax error"),
    ],
)
async def test_a_query_that_would_not_do_fails_its_own_waits(broker, watch, query, message):
    good = watch(f"SELECT id FROM {broker.queue}", interval=0.5)
    with pytest.raises(SourceUnfit, match=f"(?s)the connection 'source'.*{message}"):
        await soon(watch(query.format(broker.queue)))
    assert broker.unacknowledged() == 0
    broker.send(1)
    await soon(good)


async def test_parameters_that_are_no_parameters(watch):
    with pytest.raises(TypeError, match="a mapping, a sequence or None, not 'x'"):
        await soon(watch("SELECT 1", parameters="x"))
    with pytest.raises(SourceUnfit, match="placeholder"):
        await soon(watch("SELECT %s", parameters=[1, 2]))


async def test_a_query_that_takes_too_long_is_asked_again(broker, watch, settings, caplog):
    settings("statement_timeout = '300ms'")
    query = f"SELECT id, pg_sleep(CASE WHEN (SELECT count(*) FROM {broker.queue}) = 0 THEN 5 ELSE 0 END) FROM "
    task = watch(query + "(VALUES (1)) AS v (id)", interval=0.5)
    await nothing(task, 2)
    assert "statement timeout" in caplog.text
    broker.send(1)
    assert (await soon(task))["id"] == 1


async def test_a_watch_outlives_the_server(broker, watch):
    task = watch(f"SELECT id FROM {broker.queue}", interval=600, channel="airflow_events")
    await nothing(task, 0.5)
    broker.server.kill()
    await asyncio.sleep(1)
    broker.server.start()
    broker.send(1)
    assert await soon(task, 30) == {"id": 1}


async def test_a_watch_on_no_server(connect, watch, monkeypatch):
    connect("nowhere", port=1)
    connect("other", conn_type="mysql")
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
    with pytest.raises(SourceUnreachable, match="'nowhere'"):
        await soon(watch("SELECT 1", postgres_conn_id="nowhere"))
    with pytest.raises(SourceUnfit, match="of type 'mysql', and 'postgres'"):
        await soon(watch("SELECT 1", postgres_conn_id="other"))
