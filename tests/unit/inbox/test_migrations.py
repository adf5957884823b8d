"""The tables are what the models say, in each database, whatever form they had before."""

from __future__ import annotations

import io
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import uuid6
from airflow.cli.commands.db_command import _get_version_revision
from airflow.models.base import metadata as airflow_metadata
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow_events.errors import InboxNotMigrated, InboxTooNew
from airflow_events.inbox.manager import InboxDBManager
from airflow_events.inbox.models import Base, EventKept, EventSent, EventTaken, EventWait
from airflow_events.provider_info import VERSION
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, func, insert, inspect, select, text
from sqlalchemy.dialects import mysql, postgresql, sqlite

HERE = Path(__file__).parent
FIRST = "e1a70c5b0001"
OURS = set(Base.metadata.tables)
NOW = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)


def differences(database):
    """Return what Alembic would have to change in the database to make it what the models say."""

    def is_ours(name, kind, _):
        return kind != "table" or name in OURS

    with database.connect() as connection:
        options = {"include_name": is_ours, "compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)


def there(database):
    """Return which of our tables are."""
    return OURS & set(inspect(database).get_table_names())


def drop(database, *tables):
    with database.begin() as connection:
        for table in tables:
            connection.execute(text(f"DROP TABLE {table}"))


@pytest.fixture
def task(database):
    """The task instance of the run ``golden``, committed."""
    key = {"dag_id": "shop", "run_id": "golden"}
    with database.begin() as connection:
        run = {"id": 900_001, "run_type": "manual", "run_after": NOW, "state": "running"}
        connection.execute(insert(DagRun.__table__).values(key | run))
        ti = {"id": uuid6.uuid7(), "task_id": "wait", "map_index": -1, "state": "deferred", "try_number": 1}
        rest = {"pool": "default_pool", "pool_slots": 1, "max_tries": 0, "span_status": "not_started"}
        connection.execute(insert(TaskInstance.__table__).values(key | ti | rest))
    yield key | {"task_id": "wait", "map_index": -1}
    with database.begin() as connection:
        for table in (EventWait, TaskInstance, DagRun):
            connection.execute(delete(table.__table__).where(table.__table__.c.run_id == "golden"))


def test_the_models_are_what_the_migrations_make(database):
    assert there(database) == OURS
    assert differences(database) == []


def test_a_difference_would_be_seen(database, manager):
    on = " ON event_sent" if database.dialect.name == "mysql" else ""
    with database.begin() as connection:
        connection.execute(text(f"DROP INDEX ix_event_sent_expires{on}"))
        connection.execute(text("ALTER TABLE event_taken ADD COLUMN other INTEGER"))
    assert sorted(one[0] for one in differences(database)) == ["add_index", "remove_column"]


def columns():
    """Return the columns of our tables as text."""
    dialects = postgresql.dialect(), mysql.dialect(), sqlite.dialect()
    lines = ["table | column | PostgreSQL | MySQL | SQLite | null"]
    for name in (
        "event_wait",
        "event_taken",
        "event_kept",
        "event_sent",
        "event_position",
        "event_host",
        "event_start",
    ):
        for column in Base.metadata.tables[name].columns:
            types = (column.type.compile(dialect) for dialect in dialects)
            null = "primary key" if column.primary_key else "null" if column.nullable else "not null"
            lines.append(" | ".join([name, column.name, *types, null]))
    return "\n".join(lines) + "\n"


def test_columns_have_the_form_that_is_published():
    """Whoever changes one writes a migration, and then changes the file."""
    assert columns() == (HERE / "columns.txt").read_text()


def test_the_first_version_is_migrated_with_its_rows(database, manager, task):
    drop(database, *OURS, manager.version_table_name)
    with database.begin() as connection:
        for statement in (HERE / f"{FIRST}.{database.dialect.name}.sql").read_text().split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    manager.upgradedb()
    manager.check()
    assert differences(database) == []

    def at(minutes, microseconds=0):
        return NOW + timedelta(minutes=minutes, microseconds=microseconds)

    session = manager.session
    [single, third] = session.scalars(select(EventWait).order_by(EventWait.place))
    assert {name: getattr(third, name) for name in ("dag_id", "run_id", "task_id", "map_index")} == task
    assert (single.place, single.generation, single.clears, single.phase) == (-1, 0, 0, None)
    assert (single.since, single.event, single.arguments) == (None, None, None)
    assert (third.place, third.listener, third.call) == (3, "DirectoryListener", "DirectoryListener('größe 🎉')")
    assert (third.arguments, third.address) == (b"\x0a" * 32, b"\x0b" * 32)
    assert (third.generation, third.holder, third.clears, third.finished_by) == (2, "host:17", 1, 2)
    assert (third.since, third.run_start, third.deadline) == (at(0), at(1), at(2, 1))
    assert (third.phase, third.event, third.record_clears) == ("committed", '{"n": 1}', 1)
    assert (third.record_id, third.recorded_after, third.lost) == ("r2", "r1", "r1")
    assert (third.recorded_at, third.committed_at, third.delivered_at) == (at(3), at(4), at(5))
    assert (third.sent_by, third.reason, third.expires) == ("ada", "why not", at(6))
    assert third.receipt == '{"status": "kept"}'
    [one, other] = session.scalars(select(EventTaken).order_by(EventTaken.record_id))
    assert (one.identity, one.content, one.record_id) == (b"\x01" * 32, b"\x02" * 32, "r2")
    assert (one.wait, one.taken_at, one.acknowledged_at) == ("shop / golden / wait / -1 / 3", at(3), at(4))
    assert (other.identity, other.content, other.acknowledged_at) == (b"\xff" * 32, b"\x00" * 32, None)
    [kept] = session.scalars(select(EventKept))
    assert (kept.address, kept.key, kept.event, kept.event_id) == (b"\x0b" * 32, "größe 🎉", '{"n": 2}', "k1")
    assert (kept.to, kept.sent_by, kept.dags, kept.reached) == ("all", "ada", '["shop"]', "[]")
    assert (kept.kept_at, kept.expires) == (at(8), at(9))
    [sent] = session.scalars(select(EventSent))
    assert (sent.identity, sent.content, sent.expires) == (b"\x03" * 32, b"\x04" * 32, at(10))
    assert sent.receipt == '{"status": "delivered"}'


def test_down_to_nothing_and_up_again(database, manager):
    manager.downgrade("base")
    assert there(database) == set()
    with pytest.raises(InboxNotMigrated, match="are missing"):
        manager.check()
    assert not manager.check_migration()
    manager.upgradedb()
    manager.check()
    assert manager.check_migration()
    assert differences(database) == []
    manager.upgradedb()  # nothing to do


def test_a_migration_is_found_by_the_version_of_its_release(manager):
    """`airflow db-manager` takes ``--to-version``."""
    heads = manager.revision_heads_map
    known = [one.revision for one in manager.get_script_object().walk_revisions()]
    assert heads[VERSION] == known[0], "a migration since the last release stands at the version that is next"
    assert set(heads.values()) <= {"base", *known}
    versions = [tuple(map(int, version.split("."))) for version in heads]
    assert versions == sorted(versions)  # as Airflow wants it
    assert _get_version_revision("0.1.7", heads) == "base"


def test_a_migration_that_breaks_off_can_be_run_again(database, manager):
    drop(database, *OURS, manager.version_table_name)
    with database.begin() as connection:
        connection.execute(text("CREATE TABLE event_taken (other INTEGER)"))
    with pytest.raises(Exception, match="record_id"):
        manager.upgradedb()
    left = {"event_taken", "event_wait"} if database.dialect.name == "mysql" else {"event_taken"}
    assert there(database) == left
    drop(database, "event_taken")
    manager.upgradedb()
    manager.check()
    assert differences(database) == []


def test_tables_without_a_version_keep_their_rows(database, manager):
    drop(database, manager.version_table_name, "event_kept")
    with database.begin() as connection:
        connection.execute(
            insert(EventSent).values(identity=b"\x01" * 32, content=b"\x02" * 32, receipt="{}", expires=NOW)
        )
    manager.initdb()
    manager.check()
    assert differences(database) == []
    assert manager.session.scalar(select(func.count()).select_from(EventSent)) == 1


def test_a_later_version_is_refused_by_name(database, manager):
    with database.begin() as connection:
        connection.execute(text(f"UPDATE {manager.version_table_name} SET version_num = 'feed'"))
    for ask in (manager.check, manager.upgradedb, lambda: manager.downgrade("base")):
        with pytest.raises(InboxTooNew, match=r"revision feed.*up to revision \w+: install the later") as raised:
            ask()
        assert raised.value.found == "feed"
    assert not manager.check_migration()
    assert there(database) == OURS


def test_a_wait_goes_with_its_run(database, task):
    with database.connect() as connection:
        values = {**task, "place": -1, "generation": 0, "clears": 0}
        connection.execute(insert(EventWait.__table__).values(values))
        connection.execute(delete(DagRun.__table__).where(DagRun.__table__.c.run_id == "golden"))
        assert connection.scalar(select(func.count()).select_from(EventWait)) == 0
        connection.rollback()


def test_our_tables_are_gone_before_airflow_drops_that_of_task_instances(database, manager):
    with database.begin() as connection:
        tell = airflow_metadata.dispatch.before_drop
        tell(airflow_metadata, connection, tables=[DagRun.__table__], checkfirst=True)
        assert inspect(connection).has_table("event_wait")
        tell(airflow_metadata, connection, tables=[TaskInstance.__table__], checkfirst=True)
    assert there(database) == set()
    assert not inspect(database).has_table(manager.version_table_name)


@pytest.mark.parametrize("dialect", ["mysql", "postgresql", "sqlite"])
def test_every_database_has_words_for_the_migrations(dialect):
    """Where no server of its kind runs as well."""
    nowhere = SimpleNamespace(dialect=SimpleNamespace(name=dialect))
    manager = InboxDBManager(SimpleNamespace(get_bind=lambda: SimpleNamespace(engine=nowhere)))
    config = manager.get_alembic_config()
    config.output_buffer = said = io.StringIO()
    command.upgrade(config, "head", sql=True)
    command.downgrade(config, "head:base", sql=True)
    for name in OURS:
        assert f"CREATE TABLE {name}" in said.getvalue()
        assert f"DROP TABLE IF EXISTS {name}" in said.getvalue()
    added, dropped = (set(re.findall(rf"{verb} COLUMN (\w+)", said.getvalue())) for verb in ("ADD", "DROP"))
    assert added
    assert added == dropped
    assert "DROP INDEX event_wait_wake_at" in said.getvalue()
    words = {
        "mysql": ("arguments BINARY(32)", "event LONGTEXT", "since TIMESTAMP(6) NULL", "AUTO_INCREMENT"),
        "postgresql": ("arguments BYTEA", "event TEXT", "since TIMESTAMP WITH TIME ZONE", "SERIAL"),
        "sqlite": ("arguments BLOB", "event TEXT", "since TIMESTAMP"),
    }
    assert all(word in said.getvalue() for word in (*words[dialect], "ON DELETE CASCADE ON UPDATE CASCADE"))


@pytest.mark.parametrize("schema", [None, "meta"])
def test_the_foreign_key_finds_airflows_tables_in_a_schema_of_their_own(schema, monkeypatch):
    monkeypatch.setattr(airflow_metadata, "schema", schema)  # as of [database] sql_alchemy_schema
    nowhere = SimpleNamespace(dialect=SimpleNamespace(name="postgresql"))
    config = InboxDBManager(SimpleNamespace(get_bind=lambda: SimpleNamespace(engine=nowhere))).get_alembic_config()
    config.output_buffer = said = io.StringIO()
    command.upgrade(config, FIRST, sql=True)
    assert f"REFERENCES {schema + '.' if schema else ''}task_instance (dag_id" in said.getvalue()
    assert "CREATE TABLE event_wait" in said.getvalue()
