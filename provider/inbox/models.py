"""
The tables of the inbox, in Airflow's database.

Their form is frozen by the migrations beside this file: whoever changes a column here writes a migration, and
``tests/unit/inbox/test_migrations.py`` compares the two.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from airflow.models.base import StringID
from airflow.models.taskinstance import TaskInstance
from airflow.utils.sqlalchemy import UtcDateTime
from sqlalchemy import (
    BigInteger,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DIGEST_LENGTH = 32
"""Bytes of a SHA-256 digest."""

LATEST = datetime(2038, 1, 19, tzinfo=timezone.utc)
"""The last moment that all of Airflow's databases can hold: what expires later than that expires then."""

SINGLE = -1
"""The ``place`` of a wait for one event; in a list of waits, places count from 0."""

_long_text = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_digest = LargeBinary(DIGEST_LENGTH).with_variant(mysql.BINARY(DIGEST_LENGTH), "mysql", "mariadb")


class Base(DeclarativeBase):
    """Has metadata of its own, since the tables are made by a DB manager of their own."""

    metadata = MetaData()


class EventWait(Base):
    """
    A wait: one task instance, or one place in its list, that waits for one event.

    The row is made when the wait begins, or when an event is sent to it before that; it outlives retries and
    clears, and goes with the task instance. ``phase`` is NULL as long as there is no event, and a value of
    `airflow_events.inbox.entries.Phase` from then on.

    Whoever works for the wait has to name ``generation``, which each beginning raises: requests of a process that
    the wait has outlived are refused by it.
    """

    __tablename__ = "event_wait"

    dag_id: Mapped[str] = mapped_column(StringID(), primary_key=True)
    task_id: Mapped[str] = mapped_column(StringID(), primary_key=True)
    run_id: Mapped[str] = mapped_column(StringID(), primary_key=True)
    map_index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    place: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)

    # What it waits for.
    listener: Mapped[str | None] = mapped_column(String(250))
    call: Mapped[str | None] = mapped_column(_long_text)
    """Listener and rendered arguments as the call that they are, with secrets masked."""
    arguments: Mapped[bytes | None] = mapped_column(_digest)
    """A digest of the rendered arguments; an event that was taken belongs to them."""
    address: Mapped[bytes | None] = mapped_column(_digest)
    """A digest of the key under which events can be sent to it; NULL if there is none."""

    # Who works for it, and how long.
    generation: Mapped[int] = mapped_column(Integer, default=0)
    holder: Mapped[str | None] = mapped_column(String(250))
    """The process that began it last: ``host:pid``."""
    since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When it first began; NULL if it has not. A clear does not change it."""
    run_start: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """The start of the run as it was then, which a clear of the run does not change."""
    deadline: Mapped[datetime | None] = mapped_column(UtcDateTime)
    clears: Mapped[int] = mapped_column(Integer, default=0)
    """``TaskInstance.max_tries`` at the last beginning: it grows with each clear, and by nothing else."""

    # Its event.
    phase: Mapped[str | None] = mapped_column(String(20))
    event: Mapped[str | None] = mapped_column(_long_text)
    """As `airflow_events.listeners.support.serde.encode` writes it."""
    record_id: Mapped[str | None] = mapped_column(String(40))
    """Of this recording, so that it can be told from a later one."""
    record_clears: Mapped[int | None] = mapped_column(Integer)
    """``clears`` when it was recorded: with ``replay=False`` only an event of this number counts."""
    recorded_after: Mapped[str | None] = mapped_column(String(40))
    """``lost`` when it was recorded, which names the claim that the source has for it."""
    lost: Mapped[str | None] = mapped_column(String(40))
    """The ``record_id`` of the recording that was lost to another wait last; NULL if none was."""
    recorded_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    committed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_by: Mapped[int | None] = mapped_column(Integer)
    """The generation that ended the task last, whose repeated request is answered as the first was."""
    sent_by: Mapped[str | None] = mapped_column(String(250))
    """Who sent the event, or rejected the wait; NULL for an event that was polled."""
    reason: Mapped[str | None] = mapped_column(_long_text)
    """Why it was rejected."""
    expires: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Of an event that was sent before the wait began: until when it may be taken. NULL: as long as the run."""
    receipt: Mapped[str | None] = mapped_column(_long_text)
    """What the sender was told, as JSON."""
    wanted: Mapped[int | None] = mapped_column(Integer)
    """Of a task that waits for many: how many events it wants; NULL of others, and of the places of the list."""

    # How it goes on without a trigger.
    parked: Mapped[str | None] = mapped_column(_long_text)
    """The arguments of the trigger that it had, encrypted as in that one's row; NULL if it is not parked."""
    wake_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When ``wake`` is to be carried out; NULL for never."""
    parked_try: Mapped[str | None] = mapped_column(String(40))
    """The UUID of the try that was parked, or is hosted: no trigger of that try works for it any more."""
    wake: Mapped[str | None] = mapped_column(_long_text)
    """An entry of `airflow_events.inbox.entries`, as JSON, by which the wait ends then."""

    # What the API server looks for in Airflow's own database for it; NULL of all other waits.
    sought: Mapped[str | None] = mapped_column(_long_text)
    """As JSON, the same for all waits with this ``address``."""
    sought_kind: Mapped[str | None] = mapped_column(String(20))
    sought_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """What was before that is not the wait's."""

    host: Mapped[bytes | None] = mapped_column(_digest)
    """Which of `EventHost` polls for it; NULL if it has a trigger of its own, or needs none."""
    hosted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    __table_args__ = (
        ForeignKeyConstraint(
            [dag_id, task_id, run_id, map_index],
            [TaskInstance.dag_id, TaskInstance.task_id, TaskInstance.run_id, TaskInstance.map_index],
            name="event_wait_task_instance_fkey",
            ondelete="CASCADE",
            onupdate="CASCADE",
        ),
        Index("event_wait_phase", phase),
        Index("event_wait_address", address),
        Index("event_wait_wake_at", wake_at),
        Index("event_wait_host", "host", "hosted_at"),
        Index("event_wait_sought", sought_kind, phase),
    )


class EventTaken(Base):
    """
    Which wait has an event of a source. It outlives the wait's run.

    The unique key is a digest, because names and ids of any length, in any alphabet, have to be told apart by
    every database; ``content`` tells a redelivery from another event that the source gives the same id.
    """

    __tablename__ = "event_taken"

    identity: Mapped[bytes] = mapped_column(_digest, primary_key=True)
    """Of the scope, the source's incarnation and the event's id."""
    content: Mapped[bytes] = mapped_column(_digest)
    record_id: Mapped[str] = mapped_column(String(40), index=True)
    wait: Mapped[str] = mapped_column(Text)
    """`airflow_events.listeners.base.Wait.id`, for whoever looks."""
    taken_at: Mapped[datetime] = mapped_column(UtcDateTime)
    acknowledged_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    """When the source confirmed that it has forgotten the event; its age counts from here. NULL: not yet."""
    set_aside: Mapped[str | None] = mapped_column(Text)
    """Why ``wait`` could not read it, and failed for it; NULL of an event that is recorded."""


class EventKept(Base):
    """An event that was sent to a key, and waits for waits that begin."""

    __tablename__ = "event_kept"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    address: Mapped[bytes] = mapped_column(_digest, index=True)
    key: Mapped[str] = mapped_column(Text)
    event: Mapped[str] = mapped_column(_long_text)
    event_id: Mapped[str] = mapped_column(String(40))
    to: Mapped[str] = mapped_column(String(10))
    """``one`` or ``all``."""
    sent_by: Mapped[str] = mapped_column(String(250), index=True)
    dags: Mapped[str | None] = mapped_column(_long_text)
    """To which DAGs' waits its sender might send it, a JSON list; NULL for all."""
    sender: Mapped[str | None] = mapped_column(_long_text)
    """Who is asked whether it still may, encrypted (`airflow_events.api.senders`); NULL: nobody can be."""
    reached: Mapped[str] = mapped_column(_long_text)
    """Which waits it has reached, a JSON list of their ids."""
    kept_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires: Mapped[datetime] = mapped_column(UtcDateTime, index=True)

    __table_args__ = (UniqueConstraint(event_id, name="event_kept_event_id_key"),)


class EventSent(Base):
    """What a sender was told who gave an idempotency key."""

    __tablename__ = "event_sent"

    identity: Mapped[bytes] = mapped_column(_digest, primary_key=True)
    """Of the sender's idempotency key and what it was used for."""
    content: Mapped[bytes] = mapped_column(_digest)
    receipt: Mapped[str] = mapped_column(_long_text)
    """As JSON."""
    expires: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class EventHost(Base):
    """A trigger that polls for many waits, and in Airflow's eyes is that of one of them, the anchor."""

    __tablename__ = "event_host"

    host: Mapped[bytes] = mapped_column(_digest, primary_key=True)
    trigger_id: Mapped[int | None] = mapped_column(Integer)
    """The row in Airflow's table, which Airflow deletes when no wait has it any more."""
    log_of: Mapped[str | None] = mapped_column(Text)
    """In whose log what it logs is found: the `Wait.id` of the anchor that it was started for, and its try."""
    trouble: Mapped[str | None] = mapped_column(Text)
    """What is wrong with the sources of its waits, as it said last; NULL if nothing is."""
    waits: Mapped[int | None] = mapped_column(Integer)
    """For how many waits it polls, as it said last: after a restart it takes them in one after another."""


class EventStart(Base):
    """A trigger that starts runs, and what it says of its source."""

    __tablename__ = "event_start"

    trigger_id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """The row in Airflow's table. SQLite gives the number of one that is deleted to the next one."""
    lag: Mapped[int | None] = mapped_column(BigInteger)
    """How many messages nobody has acknowledged yet; NULL if the source does not tell."""
    trouble: Mapped[str | None] = mapped_column(Text)
    """What is wrong with the source; NULL if nothing is."""
    told_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    """When it said so; it does so again while it lives, though nothing has changed."""


class EventPosition(Base):
    """How far the log of a source is settled, which outlives what the source itself keeps of it."""

    __tablename__ = "event_position"

    source: Mapped[bytes] = mapped_column(_digest, primary_key=True)
    """A digest of what tells it from every other source."""
    name: Mapped[str] = mapped_column(Text)
    """The same in words, for whoever looks."""
    owner: Mapped[str] = mapped_column(String(40))
    """An id of this deployment, which it leaves at the source."""
    positions: Mapped[str] = mapped_column(_long_text)
    """By place, ranges of offsets that are never to be delivered again, as JSON."""
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


def columns(model: type[Base]) -> dict[str, Any]:
    """Return the columns of a table by their names."""
    return dict(model.__table__.columns.items())
