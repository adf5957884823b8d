"""What is peculiar to PostgreSQL: tables and users as they should not be, locks, logins, and questions."""

from __future__ import annotations

import asyncio
import contextlib
import copy
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
from collections import Counter
from datetime import datetime, timedelta, timezone

import psycopg
import pytest
from airflow_events.errors import EventUndecodable, SourceMisconfigured, SourceUnreachable
from airflow_events.listeners.base import Wait, working_for
from airflow_events.listeners.postgres import (
    PostgresListener,
    PostgresWatchListener,
    client,
    consume,
    create_table,
)
from airflow_events.listeners.postgres import watch as watching
from airflow_events.listeners.postgres.client import LONGEST
from airflow_events.listeners.postgres.consume import TableHub
from airflow_events.listeners.postgres.watch import QueryHub
from airflow_events.listeners.support import queue, serde
from airflow_events.triggers.event import recording
from broker import nothing, soon, until_told
from of_postgres import PostgresJsonb, PostgresTable
from test_queue import another_triggerer, committed, polled

from deployment import free_port, until


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


# Everybody reads every row, and the inbox decides.


def id_and_content(event):
    """Return what the inbox knows an event by."""
    told = recording(PostgresListener, "scope", Wait("dag", "run", "task"), event)
    return told["identity"], told["content"]


@contextlib.contextmanager
def silent_proxy(to):
    """Yield the port of a proxy, and an event: while it is set, what was connected before gets no answer."""
    listener, is_silent = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def pass_on(one, other, is_answer):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if not (is_answer and is_silent.is_set()):
                    other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def run():
        with contextlib.suppress(OSError):
            while True:
                taken, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", to))
                for one, other, is_answer in ((taken, server, False), (server, taken, True)):
                    threading.Thread(target=pass_on, args=(one, other, is_answer), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    yield listener.getsockname()[1], is_silent
    listener.close()


def acknowledged_at(broker):
    return [at for (at,) in broker.run(f"SELECT acknowledged_at FROM {broker.queue} ORDER BY id")]


async def test_another_triggerer_is_given_the_same_event_and_may_acknowledge_it(broker, waits):
    task = waits.poll()
    broker.send({"n": 1})
    event = await soon(task)
    async with another_triggerer(broker) as process:
        other = await asyncio.to_thread(polled, process)
    assert id_and_content(other) == id_and_content(event)
    await waits.commit(event)
    [at] = acknowledged_at(broker)
    await waits.commit(other, 1)  # whose record says that it is another's
    assert acknowledged_at(broker) == [at]


async def test_by_whatever_connection_and_name_it_is_the_same_row(broker, waits, connect):
    connect("again", host="localhost")
    broker.send("a")
    event = await soon(waits.poll())
    broker.queue = f"public.{broker.queue}"
    async with another_triggerer(broker, postgres_conn_id="again", columns={"value": "value"}) as process:
        again = await asyncio.to_thread(polled, process)
    assert again != event
    assert id_and_content(again) == id_and_content(event)


async def test_waits_of_one_triggerer_that_look_otherwise_have_other_rows(broker, waits):
    broker.send("a", "b")
    first, second = waits.poll(0), waits.poll(1, poll_interval=1, order_by="id")
    assert {(await soon(first))["value"], (await soon(second))["value"]} == {"a", "b"}
    third = waits.poll(2, poll_interval=1)
    await nothing(third, 2)
    await waits.release(first.result())
    assert await soon(third) == first.result()


async def test_nothing_is_held_open_at_the_server_while_a_row_is_in_hand(broker, waits):
    broker.send("a")
    event = await soon(waits.poll())
    ours = "FROM pg_stat_activity WHERE application_name = 'airflow-events'"
    assert broker.run(f"SELECT DISTINCT state, backend_xid IS NULL, backend_xmin IS NULL {ours}") == [
        ("idle", True, True)
    ]
    await waits.commit(event)


async def test_a_row_that_took_its_number_early_and_was_committed_late_is_found(broker, waits):
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"INSERT INTO {broker.queue} (value) VALUES ('1')")
        broker.send(2)
        event = await soon(waits.poll())
        await waits.commit(event)
        task = waits.poll(1)
        await nothing(task, 0.5)
        other.execute("COMMIT")
    assert ((await soon(task))["id"], event["id"]) == (1, 2)


async def test_more_waits_than_a_look_takes(broker, waits):
    tasks = [waits.poll(number, poll_interval=600) for number in range(1200)]
    broker.run(f"INSERT INTO {broker.queue} (value) SELECT to_jsonb(n) FROM generate_series(1, 1300) n")
    events = await soon(asyncio.gather(*tasks), 120)
    assert {event["value"] for event in events} == set(range(1, 1201))
    await asyncio.gather(*(waits.commit(event, number) for number, event in enumerate(events)))
    assert broker.unacknowledged() == 100


async def test_a_row_that_somebody_has_locked_is_read_and_does_not_stop_the_others(broker, waits):
    broker.send("a", "b", "c")
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT FROM {broker.queue} WHERE id = 2 FOR UPDATE")
        events = [await soon(waits.poll(number)) for number in range(3)]
        results = await asyncio.gather(*map(waits.commit, events, range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [
            type(None), psycopg.errors.LockNotAvailable, type(None)
        ]  # fmt: skip
        assert "somebody has locked the row" in str(results[1])
        other.execute("ROLLBACK")
    assert broker.unacknowledged() == 1
    await waits.commit(events[1], 1)  # as whoever called it does
    assert broker.unacknowledged() == 0


async def test_a_row_that_another_triggerer_had_and_somebody_has_locked(broker, waits):
    broker.send("a")
    async with another_triggerer(broker) as process:
        event = await asyncio.to_thread(polled, process)
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT FROM {broker.queue} FOR UPDATE")
        with pytest.raises(psycopg.errors.LockNotAvailable, match="somebody has locked the row 1"):
            await waits.commit(event)
        other.execute("ROLLBACK")
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_role_whose_transactions_are_timed_waits_on(broker, waits, settings, caplog):
    settings("transaction_timeout = '300ms'")
    with broker.server.connect() as other:
        other.execute("SET transaction_timeout = 0")
        other.execute("BEGIN")
        other.execute(f"LOCK {broker.queue}")
        task = waits.poll(poll_interval=0.1)
        await until_told(caplog, "cannot be reached")
        other.execute("ROLLBACK")
    broker.send("a")
    assert (await soon(task, 30))["value"] == "a"


async def test_a_table_that_is_locked_is_waited_for(broker, waits, caplog):
    task = waits.poll()
    await nothing(task, 0.5)
    broker.send("a")
    first = await soon(task)
    with broker.server.connect() as other:
        other.execute("BEGIN")
        other.execute(f"LOCK TABLE {broker.queue}")
        other.execute(f"INSERT INTO {broker.queue} (value) VALUES ('1')")
        late = waits.poll(1)
        await until_told(caplog, "canceling statement due to lock timeout")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await waits.commit(first)
        other.execute("COMMIT")
    assert (await soon(late, 30))["value"] == 1
    await waits.commit(first)


async def test_an_acknowledgement_without_an_answer_is_tried_over_another_connection(
    broker, waits, connect, monkeypatch
):
    monkeypatch.setattr(client, "ANSWER", 1.0)
    broker.send("a", "b")
    with silent_proxy(broker.server.port) as (port, is_silent):
        connect(port=port)
        events = [await soon(waits.poll(number)) for number in range(2)]
        await waits.commit(events[0])
        is_silent.set()
        with pytest.raises(psycopg.OperationalError):
            await soon(waits.commit(events[1], 1))
        is_silent.clear()
        await waits.commit(events[1], 1)
    assert broker.unacknowledged() == 0


async def test_a_row_that_is_gone_or_was_acknowledged_by_hand_is_the_waits_all_the_same(broker, waits):
    broker.send("a", "b", "c")
    events = [await soon(waits.poll(number)) for number in range(3)]
    broker.run(f"DELETE FROM {broker.queue} WHERE id = %s", events[0]["id"])
    broker.run(f"UPDATE {broker.queue} SET acknowledged_at = '2026-01-01Z' WHERE id = %s", events[1]["id"])
    for number, event in enumerate(events):
        await waits.commit(event, number)
    assert broker.unacknowledged() == 0
    assert acknowledged_at(broker)[0] == datetime(2026, 1, 1, tzinfo=timezone.utc)


async def test_rows_are_deleted_by_choice_and_marked_ones_are_not_delivered(broker, waits):
    broker.send("before", "a", "b")
    broker.run(f"UPDATE {broker.queue} SET acknowledged_at = now() WHERE id = 1")
    event = await soon(waits.poll(on_commit="delete"))
    await waits.commit(event)
    assert event["value"] == "a"
    assert broker.run(f"SELECT id FROM {broker.queue} ORDER BY id") == [(1,), (3,)]
    broker.run(f"DROP TABLE {broker.queue}")
    broker.run(create_table(broker.queue, on_commit="delete"))
    broker.send("c")
    async with another_triggerer(broker, on_commit="delete") as process:
        event = await asyncio.to_thread(polled, process)
    for _ in range(2):
        await waits.commit(event)
    assert event["value"] == "c"
    assert broker.run(f"SELECT id FROM {broker.queue}") == []
    with pytest.raises(SourceMisconfigured, match="it has no column 'acknowledged_at'"):
        await soon(waits.poll(1))


# What tells a row from another.


async def test_a_table_that_is_made_anew_has_other_rows(broker, waits):
    broker.send("a")
    event = await soon(waits.poll(0))
    task = waits.poll(1)
    await nothing(task, 0.5)
    broker.run(f"BEGIN; DROP TABLE {broker.queue}; {create_table(broker.queue)} COMMIT")
    broker.send("a")
    again = await soon(task)
    assert (event["id"], again["id"]) == (1, 1)
    assert PostgresListener().event_id(again) != PostgresListener().event_id(event)
    await waits.commit(event)
    assert broker.unacknowledged() == 1
    await waits.commit(again, 1)
    assert broker.unacknowledged() == 0


async def test_a_table_that_is_truncated_has_rows_of_the_same_ids_and_of_another_content(broker, waits):
    broker.send("a")
    event = await soon(waits.poll(0))
    await waits.commit(event)
    broker.run(f"TRUNCATE {broker.queue} RESTART IDENTITY")
    broker.send("a")
    (id, content), (another_id, another_content) = map(id_and_content, [event, await soon(waits.poll(1))])
    assert id == another_id
    assert content != another_content


async def test_without_the_right_to_ask_who_the_server_is_the_connection_says_it(broker, waits, connect):
    broker.run("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    broker.run(f"CREATE ROLE asker LOGIN; GRANT SELECT, UPDATE ON {broker.queue} TO asker")
    broker.send("a")
    try:
        connect(login="asker")
        event = await soon(waits.poll())
        await waits.commit(event)
    finally:
        broker.run("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC; DROP OWNED BY asker; DROP ROLE asker")
    [(oid,)] = broker.run("SELECT %s::regclass::oid", broker.queue)
    server = f"127.0.0.1:{broker.server.port}"
    assert event["source"] == [server, "postgres", f"public.{broker.queue}", oid]
    assert broker.unacknowledged() == 0


@pytest.fixture
def standby(broker):
    """A server that follows the broker's."""
    server, folder = broker.server, broker.server.folder / "standby"
    options = ["-D", str(folder), "-h", "127.0.0.1", "-p", str(server.port), "-U", "airflow", "-R", "--no-sync"]
    copied = subprocess.run([server.programs / "pg_basebackup", *options], capture_output=True, **server.user)
    assert copied.returncode == 0, copied.stderr
    standby = copy.copy(server)
    standby.port = free_port()
    listening = ["-p", str(standby.port), "-h", "127.0.0.1", "-k", str(folder), "-c", "max_connections=300"]
    with (server.folder / "standby.log").open("ab") as log:
        command = [server.programs / "postgres", "-D", str(folder), *listening]
        standby.process = subprocess.Popen(command, stdout=log, stderr=log, **server.user)
    until(standby._lets_in, "the standby follows")
    yield standby
    standby.kill()
    shutil.rmtree(folder)


async def test_after_a_failover_a_row_is_the_same(broker, waits, connect, standby, caplog):
    connect(host="127.0.0.1,127.0.0.1", port=None, extra={"port": f"{broker.server.port},{standby.port}"})
    broker.send("a", "b")
    event = await soon(waits.poll(0))

    def copied():
        with standby.connect() as client:
            return client.execute(f"SELECT count(*) FROM {broker.queue}").fetchone() == (2,)

    until(copied, "it is at the standby")
    broker.server.kill()
    connect("late", port=standby.port)
    late = waits.poll(1, postgres_conn_id="late")  # whose first server is a standby
    await until_told(caplog, "in recovery (a read-only standby)")
    with standby.connect() as client:
        client.execute("SELECT pg_promote()")
    again = await soon(late, 120)
    assert (again["value"], again["source"]) == ("b", event["source"])
    await committed(waits, event)
    with standby.connect() as client:
        left = client.execute(f"SELECT id FROM {broker.queue} WHERE acknowledged_at IS NULL").fetchall()
    assert left == [(2,)]


async def test_of_several_hosts_the_one_that_may_be_written_is_used(broker, waits, connect, standby):
    """After a failover the old primary, which often is the first of them, has joined again as a standby."""
    broker.send("a")
    connect(host="127.0.0.1,127.0.0.1", port=None, extra={"port": f"{standby.port},{broker.server.port}"})
    event = await soon(waits.poll(0), 30)
    await waits.commit(event)
    assert broker.unacknowledged() == 0


OF_FIRST_EDITION = """
CREATE TABLE {0} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload jsonb, created_at timestamptz DEFAULT now(),
    claimed_by text, claimed_at timestamptz, committed_by text, committed_at timestamptz
);
CREATE UNIQUE INDEX ON {0} (claimed_by) WHERE committed_by IS NULL;
INSERT INTO {0} (payload, claimed_by, claimed_at, committed_by, committed_at) VALUES
    ('1', 'w', now(), 'w', now()), ('2', 'dag/run0/task/-1', now(), NULL, NULL), ('3', NULL, NULL, NULL, NULL);
"""


async def test_a_table_of_the_first_edition_and_what_was_recorded_by_it(broker, waits):
    broker.run(f"DROP TABLE {broker.queue}; {OF_FIRST_EDITION.format(broker.queue)}")
    columns = {"value": "payload", "acknowledged_at": "committed_at"}
    event = await soon(waits.poll(columns=columns))
    assert event["value"] == 2  # also if a wait had claimed it
    of_old = {"table": broker.queue, "id": 2, "timestamp": None, "value": 2, "postgres_conn_id": "source"}
    await waits.commit({**of_old, "columns": {"value": "payload", "claimed_by": "claimed_by"}})
    [left] = broker.run(f"SELECT id FROM {broker.queue} WHERE committed_at IS NULL")
    assert left == (3,)
    await waits.commit(event)


# What cannot be read.


async def test_what_one_wait_cannot_read_another_format_may(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE text")
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('{{no json')")
    with pytest.raises(EventUndecodable, match=f"the row 1 of the table '{broker.queue}'"):
        await soon(waits.poll())
    await nothing(waits.poll(1))
    event = await soon(waits.poll(2, values="text"))
    assert event["value"] == "{no json"
    await waits.commit(event, 2)
    assert broker.unacknowledged() == 0


async def test_dead_letters_that_are_no_text_and_those_that_have_no_place(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE bytea USING NULL")
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('\\xff00'), ('{{}}')")
    by_choice = {"on_undecodable": "dead_letter", "dead_letter": f"public.{broker.dead_letter}"}
    event = await soon(waits.poll(0, **by_choice))
    assert event["value"] == {}
    assert broker.dead_letters() == [b"\\xff00"]
    await waits.commit(event)
    assert broker.unacknowledged() == 0
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('{{no json')")
    with pytest.raises(SourceMisconfigured, match=r"its dead letters in 'nowhere'.*\"nowhere\" does not exist"):
        await soon(waits.poll(1, on_undecodable="dead_letter", dead_letter="nowhere"))
    assert broker.unacknowledged() == 1


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
    broker.send("a")
    await soon(task)


async def test_without_notifications_the_next_look_finds_it(broker, waits):
    deaf = waits.poll(0, channel=None, poll_interval=2)
    other_channel = waits.poll(1, channel="Another \"channel\" of 'ours'", poll_interval=600)
    await nothing(deaf)
    broker.send("a")
    event = await soon(deaf)
    assert event["value"] == "a"
    await waits.commit(event)
    broker.send("b")
    await nothing(other_channel)
    broker.run("SELECT pg_notify(%s, '')", "Another \"channel\" of 'ours'")
    assert (await soon(other_channel))["value"] == "b"


async def test_a_new_wait_is_looked_for_at_once(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} DISABLE TRIGGER ALL")
    first = waits.poll(0, poll_interval=600)
    await nothing(first)
    broker.send("a")
    second = waits.poll(1, poll_interval=600)
    done, _ = await asyncio.wait([first, second], timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1


async def test_a_long_time_between_two_looks_is_not_taken_for_silence(broker, waits, watch, monkeypatch, caplog):
    for hub, module in ((TableHub, consume), (QueryHub, watching)):
        monkeypatch.setattr(hub, "serve_within", 1.0)
        monkeypatch.setattr(module, "LONGEST_PAUSE", 0.3)
    task = waits.poll(poll_interval=600, channel=None)
    watched = watch(f"SELECT id FROM {broker.queue}", interval=600)
    await nothing(asyncio.gather(task, watched), 3)
    assert "cannot be reached" not in caplog.text


async def test_notifications_of_another_table_are_not_looked_after(broker, waits, settings):
    settings("log_statement = 'all'")
    task = waits.poll(poll_interval=600)
    await nothing(task)
    log = broker.server.folder / "postgres.log"
    before = log.read_text().count("<> ALL")
    assert before > 0
    broker.run("SELECT pg_notify('airflow_events', 'public.another')")
    await nothing(task)
    assert log.read_text().count("<> ALL") == before
    broker.run(f"SELECT pg_notify('airflow_events', 'public.{broker.queue}')")
    await nothing(task)
    assert log.read_text().count("<> ALL") == before + 1


async def test_on_a_channel_of_ones_own_the_payload_may_be_anything(broker, waits):
    task = waits.poll(poll_interval=600, channel="rows")
    await nothing(task)
    broker.run(f"ALTER TABLE {broker.queue} DISABLE TRIGGER ALL")
    broker.send("a")
    broker.run("SELECT pg_notify('rows', '{\"id\": 1}')")
    assert (await soon(task, 3))["value"] == "a"


# Tables of other forms.


async def test_a_table_of_other_names(broker, waits):
    table = 'My.Out"box; DROP'
    names = {"id": "Nr.", "value": 'pay"load', "created_at": None, "acknowledged_at": "select"}
    broker.run(
        'CREATE SCHEMA IF NOT EXISTS "My"; DROP TABLE IF EXISTS "My"."Out""box; DROP";'
        'CREATE TABLE "My"."Out""box; DROP" ("Nr." uuid PRIMARY KEY DEFAULT gen_random_uuid(), "pay""load" text,'
        '"select" timestamp);'
        'INSERT INTO "My"."Out""box; DROP" ("pay""load") VALUES (\'{"a": 1}\')'
    )
    broker.queue = table
    event = await soon(waits.poll(columns=names))
    serde.check(event)
    assert (event["value"], event["timestamp"]) == ({"a": 1}, None)
    await waits.release(event, columns=names)
    assert await soon(waits.poll(1, columns=names)) == event
    for _ in range(2):
        await waits.commit(event, 1)
    assert broker.run('SELECT "select" IS NULL FROM "My"."Out""box; DROP"') == [(False,)]


def test_create_table_takes_other_names(broker):
    columns = {"value": "Payload", "acknowledged_at": "taken at"}
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
    assert event["timestamp"].utcoffset() == timedelta(0)


async def test_the_order_is_to_be_chosen(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ADD COLUMN priority int")
    for value, priority in enumerate([1, 3, 3, 2]):
        broker.run(f"INSERT INTO {broker.queue} (value, priority) VALUES (to_jsonb(%s::int), %s)", value, priority)
    order = {"order_by": ["-priority", "id"]}
    assert [(await soon(waits.poll(number, **order)))["value"] for number in range(4)] == [1, 2, 3, 0]


async def test_a_columns_type_is_what_its_domains_are_of(broker, waits):
    broker.run("DROP DOMAIN IF EXISTS body_of_order; DROP DOMAIN IF EXISTS body")
    broker.run("CREATE DOMAIN body AS jsonb; CREATE DOMAIN body_of_order AS body CHECK (VALUE IS NOT NULL)")
    broker.run(f"ALTER TABLE {broker.queue} ALTER value TYPE body_of_order")
    broker.send({"order": 1})
    event = await soon(waits.poll())
    assert event["value"] == {"order": 1}
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_row_that_was_set_aside_and_is_mended_is_delivered(broker, waits):
    """And another row by its id, as after TRUNCATE ... RESTART IDENTITY."""
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('{{\"__type\": 1}}')")
    tasks = [waits.poll(number, poll_interval=0.5) for number in range(2)]
    done, [other] = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=20)
    with pytest.raises(EventUndecodable):
        done.pop().result()
    await nothing(other)
    broker.run(f"UPDATE {broker.queue} SET value = '{{\"order\": 1}}'")
    event = await soon(other, 20)
    assert event["value"] == {"order": 1}
    await waits.commit(event, tasks.index(other))
    assert broker.unacknowledged() == 0


# Rows that a wait wants, and others.


async def test_a_wait_takes_the_rows_that_match_and_leaves_the_others(broker, waits):
    values = [
        {"kind": "paid", "order": {"id": 7}, "late": False},
        {"kind": "100 %", "order": {"id": 8}},
        {"kind": "it's \"x\"", "order": {"id": 8}},
        [1], "text", None, {"kind": None},
        {"kind": "paid", "order": {"id": 9}, "late": True},
    ]  # fmt: skip
    for value in values:
        broker.run(f"INSERT INTO {broker.queue} (value) VALUES (%s)", json.dumps(value))
    for number, (match, found) in enumerate(
        [
            ({"kind": "paid", "late": True}, values[7]),
            ({"order.id": "8", "kind": 'it\'s "x"'}, values[2]),
            ({"kind": "100 %"}, values[1]),
            ({"kind": "paid"}, values[0]),
        ]
    ):
        event = await soon(waits.poll(number, match=match))
        assert event["value"] == found
        await waits.commit(event, number)
    nothing_more = waits.poll(10, match={"kind": "paid"})
    await nothing(nothing_more)
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES (%s)", json.dumps({"kind": "paid", "n": 2}))
    assert (await soon(nothing_more))["value"] == {"kind": "paid", "n": 2}
    assert broker.unacknowledged() == 5
    assert [(await soon(waits.poll(20 + number)))["value"] for number in range(4)] == values[3:7]


@pytest.mark.parametrize("number", [0.00001, -1.5e-7, 0.1])
async def test_a_number_matches_itself_however_small(broker, waits, number):
    broker.send({"n": number}, {"n": 3})
    assert (await soon(waits.poll(match={"n": number})))["value"] == {"n": number}


async def test_a_table_may_be_called_as_anything_in_our_statements(broker, waits):
    broker.queue = "wanted"
    broker.run("DROP TABLE IF EXISTS wanted")
    broker.run(create_table("wanted"))
    broker.run("INSERT INTO wanted (value) VALUES ('{\"n\": 1}')")
    assert (await soon(waits.poll(match={"n": 1})))["value"] == {"n": 1}


async def test_a_thousand_waits_want_a_row_each_over_one_connection(broker, waits):
    tasks = {number: waits.poll(number, match={"order": number, "kind": "paid"}) for number in range(1000)}
    any_row = waits.poll(1000, match={"other": "x"})
    await asyncio.sleep(0.3)
    broker.run(
        f"INSERT INTO {broker.queue} (value) SELECT jsonb_build_object('order', n / 2, 'kind', kind) "
        "FROM generate_series(1999, 0, -1) n, unnest(ARRAY['paid', 'sent']) kind"
    )
    for number, task in tasks.items():
        assert (await soon(task, 120))["value"] == {"order": number, "kind": "paid"}
    assert broker.clients() == 1
    await nothing(any_row, 0.2)
    assert broker.unacknowledged() == 4000


async def test_rows_that_nobody_wants_hold_up_no_other(broker, waits):
    broker.run(f"INSERT INTO {broker.queue} (value) SELECT '{{}}' FROM generate_series(1, 1300)")
    broker.send({"kind": "paid"})
    assert (await soon(waits.poll(match={"kind": "paid"})))["value"] == {"kind": "paid"}


async def test_a_row_that_is_given_back_goes_to_another_wait_that_wants_it(broker, waits):
    broker.send({"kind": "paid"})
    event = await soon(waits.poll(0, match={"kind": "paid"}))
    other, same = waits.poll(1, match={"kind": "sent"}), waits.poll(2, match={"kind": "paid"})
    await nothing(same, 0.3)
    await waits.release(event, 0)
    assert (await soon(same))["id"] == event["id"]
    await nothing(other, 0.3)


@pytest.mark.parametrize("match", ["kind == 'paid'", {}, {"kind": None}, {"kind": ["paid"]}, {7: "paid"}])
async def test_a_match_that_the_server_cannot_look_for_is_refused(broker, waits, match):
    with pytest.raises(TypeError, match="match"):
        await soon(waits.poll(match=match))


async def test_a_match_needs_jsonb_and_waits_without_one_go_on(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE json")
    with pytest.raises(SourceMisconfigured, match="match needs a value of type jsonb"):
        await soon(waits.poll(match={"kind": "paid"}))
    broker.send(1)
    assert (await soon(waits.poll(1)))["value"] == 1


async def test_what_an_altered_column_makes_of_open_waits(broker, waits):
    change = f"ALTER TABLE {broker.queue} ALTER COLUMN value TYPE "
    other, matching = waits.poll(0, poll_interval=0.1), waits.poll(1, match={"kind": "paid"}, poll_interval=0.1)
    await nothing(matching, 1)
    broker.run(change + "text")
    with pytest.raises(SourceMisconfigured, match=r"match needs a value of type jsonb, .* is of type text"):
        await soon(matching)
    await nothing(other)
    broker.run(change + "jsonb USING value::jsonb")
    matching = waits.poll(2, match={"kind": "paid"}, poll_interval=0.1)
    await nothing(matching)
    broker.send({"kind": "paid"})
    first, second = await soon(other), waits.poll(3)
    broker.send({"kind": "paid"})
    assert (await soon(matching))["value"] == {"kind": "paid"}
    await waits.commit(first)
    second.cancel()


# Rows that cannot be acknowledged, or not be read.


@pytest.fixture
def kept_from_marking(broker, connect):
    """Let the connection be of a user who sees rows, and whose marks change nothing, without an error."""
    broker.run(f"CREATE ROLE reader LOGIN; GRANT SELECT, UPDATE (acknowledged_at) ON {broker.queue} TO reader")
    broker.run(f"ALTER TABLE {broker.queue} ENABLE ROW LEVEL SECURITY")
    broker.run(f"CREATE POLICY seen ON {broker.queue} FOR SELECT USING (true)")
    connect(login="reader")
    yield
    broker.run(f"DROP TABLE {broker.queue}; DROP OWNED BY reader; DROP ROLE reader")


async def test_a_row_that_the_server_silently_does_not_mark_is_not_taken_for_acknowledged(
    broker, waits, kept_from_marking
):
    broker.send("a", "b")
    event = await soon(waits.poll())
    with pytest.raises(SourceMisconfigured, match="has not acknowledged the row 1, without an error"):
        await waits.commit(event)
    assert (await soon(waits.poll(1)))["value"] == "b"
    await waits.end()
    with pytest.raises(SourceMisconfigured, match="row-level security or a trigger"):
        await waits.commit(event)  # of a process that does not have it


async def test_a_row_that_a_constraint_keeps_does_not_keep_the_others(broker, waits):
    broker.run(f"CREATE TABLE {broker.queue}_of (id bigint REFERENCES {broker.queue})")
    broker.send("a", "b", "c")
    events = [await soon(waits.poll(number, on_commit="delete")) for number in range(3)]
    broker.run(f"INSERT INTO {broker.queue}_of VALUES (%s)", events[1]["id"])
    done = await asyncio.gather(
        *(waits.commit(event, number) for number, event in enumerate(events)), return_exceptions=True
    )
    assert [type(error) for error in done] == [type(None), SourceMisconfigured, type(None)]
    assert "violates foreign key constraint" in str(done[1])
    broker.run(f"DROP TABLE {broker.queue}_of")
    await waits.commit(events[1], 1)
    assert broker.unacknowledged() == 0


async def test_a_table_that_others_inherit_from_is_refused(broker, waits):
    broker.run(f"CREATE TABLE {broker.queue}_eu (PRIMARY KEY (id)) INHERITS ({broker.queue})")
    with pytest.raises(SourceMisconfigured, match="other tables inherit from it"):
        await soon(waits.poll())


async def test_a_table_that_is_gone_for_a_moment_is_waited_for(broker, waits, caplog):
    task = waits.poll(poll_interval=0.1)
    await nothing(task, 0.5)
    broker.run(f"ALTER TABLE {broker.queue} RENAME TO aside")
    await until_told(caplog, "cannot be reached")
    broker.run(f"ALTER TABLE aside RENAME TO {broker.queue}")
    broker.send("a")
    assert (await soon(task, 30))["value"] == "a"


@pytest.mark.parametrize(("encoding", "byte"), [("SQL_ASCII", b"\xe4"), ("WIN1252", b"\x81")])
async def test_a_row_in_no_encoding_stops_no_other(broker, waits, connect, encoding, byte):
    broker.run(f"CREATE DATABASE other ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    with broker.server.connect(dbname="other", client_encoding="SQL_ASCII") as connection:
        connection.execute(create_table(broker.queue, value_type="text"))
        for raw in (b'"first"', b'"' + byte + b'"', b'"stra\xdfe"', b'"last"'):
            value = f"convert_from(decode('{raw.hex()}', 'hex'), '{encoding}')"
            connection.execute(f"INSERT INTO {broker.queue} (value) VALUES ({value})")
    connect(schema="other")
    try:
        assert (await soon(waits.poll(0)))["value"] == "first"
        with pytest.raises(EventUndecodable):
            await soon(waits.poll(1))
        if encoding == "WIN1252":
            assert (await soon(waits.poll(2)))["value"] == "straße"
        else:  # bytes of which nobody says what they mean
            with pytest.raises(EventUndecodable):
                await soon(waits.poll(2))
        assert (await soon(waits.poll(3)))["value"] == "last"
    finally:
        await waits.end()
        broker.run("DROP DATABASE other WITH (FORCE)")


# What is refused.

_ALTER = "ALTER TABLE {table} "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DROP TABLE {table}", r"there is no such table.*create_table\('queue"),
        (_ALTER + "DROP COLUMN acknowledged_at", "no column 'acknowledged_at', only 'id', 'value', 'created_at'"),
        (_ALTER + "ALTER COLUMN acknowledged_at TYPE date", "'acknowledged_at' is of type date; timestamp with"),
        (_ALTER + "ALTER COLUMN value TYPE int USING NULL", "'value' is of type integer; json or"),
        (
            _ALTER + "ALTER COLUMN id DROP IDENTITY;" + _ALTER + "ALTER COLUMN id TYPE numeric",
            "'id' is of type numeric",
        ),
        (_ALTER + "ALTER COLUMN acknowledged_at SET NOT NULL", "'acknowledged_at' is NOT NULL"),
        (_ALTER + "DROP CONSTRAINT {table}_pkey", "'id' needs a PRIMARY KEY"),
        (
            _ALTER + "DROP CONSTRAINT {table}_pkey; CREATE UNIQUE INDEX ON {table} (id) WHERE id > 1",
            "'id' needs a PRIMARY KEY",
        ),
        (_ALTER + "SET UNLOGGED", "UNLOGGED"),
        (_ALTER + "RENAME TO {table}_old; CREATE VIEW {table} AS SELECT * FROM {table}_old", "relkind 'v'"),
    ],
)
async def test_a_table_that_would_not_do(broker, waits, change, message):
    broker.run(change.format(table=broker.queue))
    with pytest.raises(
        SourceMisconfigured, match=f"(?s)the table '{broker.queue}' of the connection 'source'.*{message}"
    ):
        await soon(waits.poll())


async def test_an_unlogged_table_by_choice(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} SET UNLOGGED")
    broker.send("a")
    await waits.commit(await soon(waits.poll(require_persistence=False)))


async def test_a_table_that_is_made_fit_is_taken_by_those_who_come_later(broker, waits):
    broker.run(f"ALTER TABLE {broker.queue} RENAME COLUMN value TO payload")
    with pytest.raises(SourceMisconfigured):
        await soon(waits.poll(0))
    broker.run(f"ALTER TABLE {broker.queue} RENAME COLUMN payload TO value")
    task = waits.poll(1)
    await nothing(task)
    broker.run(f"ALTER TABLE {broker.queue} RENAME COLUMN value TO payload")
    later = waits.poll(2)
    with pytest.raises(SourceMisconfigured, match=r"it has no column .value., only"):
        await soon(later)


@pytest.fixture
def taker(broker, connect):
    """Be a user without any rights; yield what gives it one."""
    broker.run("CREATE ROLE taker LOGIN")
    connect(login="taker")
    yield lambda right, on: broker.run(f"GRANT {right} ON {on} TO taker")
    broker.run("DROP OWNED BY taker; DROP ROLE taker")


async def test_a_user_with_what_it_takes_to_mark(broker, waits, taker):
    broker.send("a")
    with pytest.raises(
        SourceMisconfigured, match=r"to SELECT the column 'id'; needed are.*UPDATE on 'acknowledged_at'"
    ):
        await soon(waits.poll())
    taker("SELECT (id, value, created_at, acknowledged_at)", broker.queue)
    with pytest.raises(SourceMisconfigured, match="to UPDATE the column 'acknowledged_at'"):
        await soon(waits.poll())
    taker("UPDATE (acknowledged_at)", broker.queue)
    event = await soon(waits.poll())
    await waits.commit(event)
    assert broker.unacknowledged() == 0


async def test_a_user_with_what_it_takes_to_delete_and_to_add_dead_letters(broker, waits, taker, monkeypatch):
    monkeypatch.setattr(queue, "_POSTPONED", 1.0)
    broker.run(f"ALTER TABLE {broker.queue} DROP COLUMN acknowledged_at, ALTER COLUMN value TYPE text")
    broker.run(f"INSERT INTO {broker.queue} (value) VALUES ('{{no json'), ('1')")
    by_choice = {"on_commit": "delete", "on_undecodable": "dead_letter", "dead_letter": broker.dead_letter}
    taker("SELECT (id, value, created_at)", broker.queue)
    with pytest.raises(SourceMisconfigured, match="the privilege DELETE, for on_commit='delete'"):
        await soon(waits.poll(**by_choice))
    taker("DELETE", broker.queue)
    with pytest.raises(
        SourceMisconfigured, match=f"may not use it: permission denied for table {broker.dead_letter}"
    ):
        await soon(waits.poll(**by_choice))
    taker("INSERT", broker.dead_letter)
    event = await soon(waits.poll(**by_choice))
    await waits.commit(event)
    assert event["value"] == 1
    waits.poll(1, **by_choice)
    while broker.run(f"SELECT id FROM {broker.queue}"):
        await asyncio.sleep(0.1)
    assert broker.dead_letters() == [b"{no json"]


async def test_a_schema_that_is_closed(broker, waits, taker):
    broker.run(f"CREATE SCHEMA IF NOT EXISTS closed; DROP TABLE IF EXISTS closed.{broker.queue}")
    broker.run(f"CREATE TABLE closed.{broker.queue} ()")
    broker.queue = f"closed.{broker.queue}"
    with pytest.raises(SourceMisconfigured, match="may not use it: permission denied for schema closed"):
        await soon(waits.poll())


async def test_a_standby_is_waited_for_until_it_is_the_primary_and_not_for_ever(broker, waits, monkeypatch):
    async def watch(query, **changes):
        poll = PostgresWatchListener().poll_for_event(query, postgres_conn_id="source", **changes)
        return await soon(asyncio.create_task(poll))

    task = waits.poll(0)
    await nothing(task)
    assert await watch("SELECT 1") == {"?column?": 1}
    broker.server.kill()
    (broker.server.folder / "data" / "standby.signal").touch()
    broker.server.start()
    try:
        assert broker.run("SELECT pg_is_in_recovery()") == [(True,)]
        await nothing(task, 2)
        assert await watch("SELECT 2 AS n") == {"n": 2}
        with pytest.raises(SourceMisconfigured, match="cannot execute LISTEN during recovery"):
            await watch("SELECT 2", channel="c")
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "1")
        with pytest.raises(SourceUnreachable, match=r"in recovery \(a read-only standby\)"):
            await soon(waits.poll(1, poll_interval=5))  # through a hub of its own
        monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "60")
        late = waits.poll(2, poll_interval=6)
        await nothing(late)
    finally:
        broker.run("SELECT pg_promote()")
    broker.send("a")
    assert (await soon(late, 40))["value"] == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"payload": "value"}}, "columns maps 'id', .* not 'payload'"),
        ({"columns": {"value": None}}, "needs a column for 'value'"),
        ({"columns": {"value": "100%"}}, "percent sign"),
        ({"poll_interval": 0}, "poll_interval is a time above zero, .*, not 0"),
        ({"columns": {"claimed_by": "c"}}, "columns maps 'id', .*, not 'claimed_by'"),
        ({"on_commit": "drop"}, "on_commit is 'mark' or 'delete', not 'drop'"),
        ({"on_undecodable": "dead_letter", "dead_letter": "a.b.c"}, "dead_letter is 'table' or 'schema.table'"),
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
    with pytest.raises(SourceMisconfigured, match="it has no column 'priority'"):
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
    for number, unusable in enumerate(({"ssl_min_protocol_version": "TLSv9"}, {"hostaddr": "no address"}), 2):
        connect(extra=unusable)
        with pytest.raises(SourceMisconfigured, match="'source' cannot be used: connection is bad"):
            await soon(waits.poll(number, poll_interval=4 + number))
    connect(extra={"ssl_mode": "verify-full"})
    with pytest.raises(SourceMisconfigured, match=r"'source' has an extra 'ssl_mode', .*did you mean 'sslmode'"):
        await soon(waits.poll(1, poll_interval=5))  # over a connection of its own


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
        await soon(waits.poll(1, poll_interval=5))
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
        await soon(waits.poll(1, poll_interval=5))
    elsewhere = {"sslmode": "verify-full", "sslrootcert": str(stranger.certificate)}
    connect(**{**there, "port": stranger.port}, extra=elsewhere)
    with pytest.raises(SourceUnreachable, match="does not match host name"):
        await soon(waits.poll(1, poll_interval=6))
    connect(**guarded, extra={"sslmode": "require"})
    with pytest.raises(SourceUnreachable, match="server does not support SSL"):
        await soon(waits.poll(2, poll_interval=7))


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


async def test_a_watch_with_a_channel_goes_on_through_a_failover(broker, watch, caplog):
    broker.run("CREATE TABLE five (n int)")
    told = watch("SELECT n FROM five", channel="c", interval=1)
    asking = watch("SELECT n FROM five", interval=1)
    await nothing(told, 2)
    broker.server.kill()
    (broker.server.folder / "data" / "standby.signal").touch()
    broker.server.start()
    try:
        await until_told(caplog, "nothing is told on the channel 'c' for a while")
        await nothing(asking, 2)
        assert not told.done()
    finally:
        broker.run("SELECT pg_promote()")
    broker.run("INSERT INTO five VALUES (5)")
    assert await soon(told, 30) == await soon(asking, 30) == {"n": 5}
    broker.run("DROP TABLE five")


def fatal(code, text):
    """What a server, or a pooler in its place, says before it closes the connection."""
    body = b"SFATAL\0VFATAL\0C" + code + b"\0M" + text + b"\0\0"
    return b"E" + struct.pack(">I", len(body) + 4) + body


@pytest.mark.parametrize("said", [fatal(b"XX000", b"DbHandler exited"), fatal(b"3D000", b"no such database")])
async def test_a_connection_that_a_pooler_ends_is_lost_whatever_it_says(broker, waits, watch, connect, said):
    is_cut, cut, links = False, asyncio.Event(), []

    async def serve(reader, writer):
        links.append(writer)
        from_server, to_server = await asyncio.open_connection("127.0.0.1", broker.server.port)

        async def up():
            while data := await reader.read(65536):
                if is_cut and data[:1] in b"QP":
                    writer.write(said)
                    await writer.drain()
                    cut.set()
                    break
                to_server.write(data)

        async def down():
            while data := await from_server.read(65536):
                writer.write(data)

        for one in asyncio.as_completed([up(), down()]):
            with contextlib.suppress(OSError):
                await one
            writer.close()
            to_server.close()

    pooler = await asyncio.start_server(serve, "127.0.0.1", 0)
    connect(port=pooler.sockets[0].getsockname()[1])
    taking, asking = waits.poll(poll_interval=0.5), watch("SELECT 1 WHERE false", interval=0.5)
    await nothing(taking, 2)
    is_cut = True
    await soon(cut.wait())
    await asyncio.sleep(1)
    is_cut = False
    assert not asking.done()
    broker.send("a")
    assert (await soon(taking, 30))["value"] == "a"
    assert not asking.done()
    pooler.close()
    for link in links:
        link.close()
    await asyncio.sleep(0.1)


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
    began = time.monotonic()
    others = [watch(query, parameters=[str(number)], interval=1) for number in range(2, 52)]

    def asked():
        log = (broker.server.folder / "postgres.log").read_text()
        return Counter(map(int, re.findall(rf"marked {broker.queue} .*\n.*DETAIL.*\$1 = '(\d+)'", log)))

    await asyncio.to_thread(
        until, lambda: all(asked()[number] >= 2 for number in range(2, 52)), "all are asked again"
    )
    assert broker.clients() - before == 1
    later = watch(query, parameters=["1"], interval=600)
    await asyncio.sleep(0.5)
    assert asked()[1] == 1
    assert max(asked().values()) <= time.monotonic() - began + 1
    broker.send(*range(1, 52))
    assert [(await soon(task))["id"] for task in others] == list(range(2, 52))
    assert not any(task.done() for task in [*same, later])
    sooner = watch(query, parameters=["1"], interval=0.5)
    for task in [*same, later, sooner]:
        assert await soon(task) == {"id": 1}
    await asyncio.to_thread(until, lambda: broker.clients() == before, "the connection has ended")


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
    with pytest.raises(SourceMisconfigured, match=f"(?s)the connection 'source'.*{message}"):
        await soon(watch(query.format(broker.queue)))
    assert broker.unacknowledged() == 0
    broker.send(1)
    await soon(good)


async def test_a_row_that_cannot_be_read_fails_its_own_waits(broker, watch):
    good = watch(f"SELECT id FROM {broker.queue}", interval=0.5)
    with pytest.raises(EventUndecodable, match=r"the row of the query .* is not readable"):
        await soon(watch("SELECT (repeat('[', 3000) || repeat(']', 3000))::json AS deep"))
    broker.send("a")
    assert await soon(good) == {"id": 1}


async def test_parameters_that_are_no_parameters(watch):
    with pytest.raises(TypeError, match="a mapping, a sequence or None, not 'x'"):
        await soon(watch("SELECT 1", parameters="x"))
    with pytest.raises(SourceMisconfigured, match="placeholder"):
        await soon(watch("SELECT %s", parameters=[1, 2]))


async def test_a_query_that_takes_too_long_is_asked_again(broker, watch, settings, caplog):
    settings("statement_timeout = '300ms'")
    query = f"SELECT id, pg_sleep(CASE WHEN (SELECT count(*) FROM {broker.queue}) = 0 THEN 5 ELSE 0 END) FROM "
    task = watch(query + "(VALUES (1)) AS v (id)", interval=0.5)
    await nothing(task, 2)
    assert "statement timeout" in caplog.text
    broker.send(1)
    assert (await soon(task))["id"] == 1


async def test_the_longest_that_a_query_may_take(watch, settings):
    """The hub gives up a server that does not answer for longer than that."""
    query = "SELECT current_setting('statement_timeout') AS s"
    assert await soon(watch(query)) == {"s": "5min"}
    assert QueryHub.serve_within > LONGEST
    for given, found in (("20s", "20s"), ("1h", "5min")):
        settings(f"statement_timeout = '{given}'")
        await asyncio.sleep(3)  # until the connection of before has ended
        assert await soon(watch(query)) == {"s": found}


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
    with pytest.raises(SourceMisconfigured, match="of type 'mysql', and 'postgres'"):
        await soon(watch("SELECT 1", postgres_conn_id="other"))


async def test_parameters_of_the_other_kind_fail_their_own_waits(broker, watch):
    good = watch(f"SELECT id FROM {broker.queue}", interval=0.5)
    await nothing(good, 1)
    bad = [watch("SELECT %s AS a", parameters={"a": 1}), watch("SELECT %(a)s AS a", parameters=[1])]
    await asyncio.wait(bad, timeout=10)
    assert not good.done(), good.exception()
    for task in bad:
        with pytest.raises(SourceMisconfigured, match="placeholder"):
            await soon(task)
    broker.send(1)
    await soon(good)


@pytest.mark.parametrize("text", ["True", "False", "None", "true", "null"])
async def test_a_text_matches_itself_however_json_writes_it(broker, waits, text):
    broker.send({"kind": text})
    assert (await soon(waits.poll(match={"kind": text})))["value"] == {"kind": text}


async def test_a_text_that_the_database_has_no_letters_for_is_no_concern_of_others(broker, waits, connect):
    broker.run("CREATE DATABASE other ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with broker.server.connect(dbname="other") as connection:
        connection.execute(create_table(broker.queue, value_type="jsonb"))
    connect(schema="other")
    try:
        other = waits.poll(0, match={"kind": "paid"}, poll_interval=0.5)
        await nothing(other, 1)
        with pytest.raises(
            SourceMisconfigured, match="no row can have what match wants, in the database's encoding"
        ):
            await soon(waits.poll(1, match={"kind": "支払い"}, poll_interval=0.5))
        await nothing(other, 1)
    finally:
        await waits.end()
        broker.run("DROP DATABASE other WITH (FORCE)")
