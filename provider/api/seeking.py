"""
Looking into Airflow's own database for those who wait for what happens there: for all of them at once.

What a wait looks for stands in its row (`airflow_events.inbox.sought`). Waits that look for the same have one
address, and each has a moment before which nothing counts for it. A look is one query that says what is looked
for, one for each kind of it that finds the first occurrences, one for the waits that these are for, and then
the events are given, some in each transaction. Nothing is remembered from one look to the next, so no
occurrence is passed over, however late its transaction was committed. Several API servers may look at once: an
event is given under the wait's lock.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from airflow.models.asset import AssetEvent, AssetModel
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow_events import settings
from airflow_events.api import sending
from airflow_events.api.keys import Begun, can_still_take, can_take
from airflow_events.api.refusals import Refusal, Unfit
from airflow_events.api.wait_rows import WaitRow, now
from airflow_events.inbox import tasks
from airflow_events.inbox.database import begin_writing, in_transaction, is_of_a_value
from airflow_events.inbox.entries import End
from airflow_events.inbox.models import EventWait
from airflow_events.listeners.airflow import AssetListener, DagRunListener, TaskListener
from airflow_events.listeners.base import EventListener, Wait
from sqlalchemy import Select, func, literal_column, select, union_all
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

# Who sends the events, as Airflow's audit log says it.
_BY = "airflow"
# How many things are looked for by one query (SQLite takes 500 parts), and how many occurrences of each it finds.
_AT_ONCE, _FIRST = 250, 100
# What is looked for of these is what a row has, letter for letter.
_NAMES = ("dag_id", "task_id", "run_id", "name", "uri")
# How many waits get their events in one transaction.
_GIVEN_AT_ONCE = 50
# A look may take this part of the time at most.
_SHARE = 0.1
_LONGEST_PAUSE = 60.0  # seconds


class _Kind(NamedTuple):
    """
    How one kind of thing is found.

    :param query: selects what there is, of what is looked for; with the column ``moment``.
    :param event: makes the event of such a row.
    """

    listener: type[EventListener]
    query: Callable[[Mapping[str, Any]], Select[Any]]
    event: Callable[[Any], dict[str, Any]]


class _Wanted(NamedTuple):
    """What some waits look for, and the earliest moment that counts for one of them."""

    address: bytes
    kind: str
    of: Mapping[str, Any]
    since: datetime


class _Found(NamedTuple):
    moment: datetime
    event: dict[str, Any]


class _Waiting(NamedTuple):
    begun: Begun
    address: bytes
    since: datetime


async def keep_looking() -> None:
    """Look every now and then, as long as the API server lives; what fails is logged, once, and tried again."""
    failing, took, before = False, 0.0, 0.0
    while True:
        # Of the last two the shorter: one that takes long says nothing of the next.
        pause = max(settings.airflow_look_interval(), min(took, before) / _SHARE)
        await asyncio.sleep(min(pause, _LONGEST_PAUSE))
        began = time.monotonic()
        try:
            reached = await asyncio.to_thread(look_once)
        except Exception:
            level = logging.DEBUG if failing else logging.ERROR
            log.log(
                level,
                "Could not check the DAG runs, tasks and assets that waits are for; this is tried again",
                exc_info=True,
            )
            failing = True
        else:
            failing = False
            if reached:
                log.info("Events were found for: %s", ", ".join(reached))
        took, before = time.monotonic() - began, took


def look_once() -> list[str]:
    """Give waits what they look for, as far as it is there; return the ids of those that have got it."""
    reached: list[str] = []
    by_kind: dict[str, list[_Wanted]] = defaultdict(list)
    for one in in_transaction(_wanted):
        by_kind[one.kind].append(one)
    for kind, ones in by_kind.items():
        for start in range(0, len(ones), _AT_ONCE):
            reached += _looked_for(kind, ones[start : start + _AT_ONCE])
    return reached


def _looked_for(kind: str, some: Sequence[_Wanted]) -> list[str]:
    reached: list[str] = []
    while some:
        try:
            found, waiting = in_transaction(lambda session, some=some: _look(session, kind, some), again=False)  # type: ignore[misc]
        except DBAPIError as error:
            if not is_of_a_value(error):
                raise
            # One holds a text that MySQL has no characters for in such a column: nothing there has that name.
            if len(some) > 1:
                half = len(some) // 2
                return [*reached, *_looked_for(kind, some[:half]), *_looked_for(kind, some[half:])]
            log.debug("Nothing can be what %s looks for: %s", some[0].of, error)
            break
        reached += _give_all(_KINDS[kind].listener, found, waiting)
        some = _further(some, found, waiting)
    return reached


def _further(
    wanted: Sequence[_Wanted], found: Mapping[bytes, list[_Found]], waiting: Sequence[_Waiting]
) -> list[_Wanted]:
    """Return what is to be looked for from later on, as the first of it came before some wait looks for it."""
    latest = {one.address: one.since for one in sorted(waiting, key=lambda one: one.since)}
    further = []
    for one in wanted:
        occurrences = found.get(one.address)
        if occurrences is None or len(occurrences) < _FIRST:
            continue
        last = occurrences[-1].moment
        if one.since < last < latest.get(one.address, last):
            further.append(one._replace(since=last))
    return further


def _wanted(session: Session) -> list[_Wanted]:
    rows = session.execute(
        select(
            EventWait.address,
            EventWait.sought_kind,
            func.max(EventWait.sought).label("of"),
            func.min(EventWait.sought_since).label("since"),
        )
        .where(*can_take(EventWait.sought_kind.in_(sorted(_KINDS))))
        .group_by(EventWait.address, EventWait.sought_kind)
    )
    return [_Wanted(row.address, row.sought_kind, json.loads(row.of), row.since) for row in rows]


@dataclass
class _Part:
    """
    A part of a query: the first occurrences of one thing, or what there is of several runs.

    :param wanted: by what the rows have in the column ``by``; where that is None, the one that is wanted.
    """

    of: Mapping[str, Any]
    by: str | None
    wanted: dict[Any, _Wanted] = field(default_factory=dict)

    def query(self, kind: _Kind, number: int) -> Select[Any]:
        query = kind.query(self.of)
        moment = query.selected_columns["moment"]
        query = query.where(moment >= min(one.since for one in self.wanted.values()))
        if self.by is None:
            query = query.order_by(moment).limit(_FIRST)
        else:
            query = query.where(getattr(DagRun, self.by).in_(list(self.wanted)))
        return select(literal_column(str(number)).label("number"), query.subquery())

    def address(self, row: Any) -> bytes | None:
        """Return whom a row is for; None if nobody, as MySQL takes texts for equal that end in other spaces."""
        told = row._mapping
        if any(told[name] != of for name, of in self.of.items() if of is not None and name in _NAMES):
            return None
        if self.of.get("partition") not in (None, told.get("partition_key")):
            return None
        one = self.wanted.get(None if self.by is None else told[self.by])
        return None if one is None else one.address


def _parts(wanted: Iterable[_Wanted]) -> list[_Part]:
    parts: dict[str, _Part] = {}
    for one in wanted:
        run_id, date = one.of.get("run_id"), one.of.get("logical_date")
        if (run_id is None) == (date is None):
            parts[one.address.hex()] = _Part(one.of, None, {None: one})
            continue
        # Thousands may want a run each, of the same DAG: these are one condition.
        by, value = ("run_id", run_id) if date is None else ("logical_date", datetime.fromisoformat(str(date)))
        of = {**one.of, "run_id": None, "logical_date": None}
        parts.setdefault(json.dumps([of, by], sort_keys=True), _Part(of, by)).wanted[value] = one
    return list(parts.values())


def _look(
    session: Session, kind: str, wanted: Sequence[_Wanted]
) -> tuple[Mapping[bytes, list[_Found]], list[_Waiting]]:
    """Return what was found of what is wanted, by address, the first of each; and the waits that it may be for."""
    found: dict[bytes, list[_Found]] = defaultdict(list)
    parts, how = _parts(wanted), _KINDS[kind]
    for row in session.execute(union_all(*(part.query(how, number) for number, part in enumerate(parts)))):
        if (address := parts[row.number].address(row)) is not None:
            found[address].append(_Found(row.moment, how.event(row)))
    for occurrences in found.values():
        occurrences.sort(key=lambda one: one.moment)
    return found, _waiting(session, found) if found else []


def _waiting(session: Session, addresses: Iterable[bytes]) -> list[_Waiting]:
    ti = TaskInstance
    rows = session.execute(
        select(
            ti.dag_id,
            ti.run_id,
            ti.task_id,
            ti.map_index,
            ti.id,
            EventWait.generation,
            EventWait.address,
            EventWait.sought_since,
        )
        .where(*can_take(EventWait.address.in_(sorted(addresses))), EventWait.sought_kind.is_not(None))
        .order_by(ti.id)
    )
    return [_Waiting(Begun(Wait(*row[:4]), row.id, row.generation), row.address, row.sought_since) for row in rows]


def _give_all(
    listener: type[EventListener], found: Mapping[bytes, list[_Found]], waiting: Sequence[_Waiting]
) -> list[str]:
    """Give each wait the first occurrence that counts for it; return which have got theirs."""
    gifts = []
    for one in waiting:
        if (first := next((each for each in found[one.address] if each.moment >= one.since), None)) is not None:
            gifts.append((one, first))
    reached: list[str] = []
    for start in range(0, len(gifts), _GIVEN_AT_ONCE):
        some = gifts[start : start + _GIVEN_AT_ONCE]
        reached += in_transaction(lambda session, some=some: _give(session, listener, some))  # type: ignore[misc]
    return reached


def _give(session: Session, listener: type[EventListener], gifts: Iterable[tuple[_Waiting, _Found]]) -> list[str]:
    begin_writing(session)
    reached: list[str] = []
    ending: list[tuple[tasks.Task, End]] = []
    for (begun, address, _), found in gifts:
        try:
            with session.begin_nested():  # so that what goes wrong with one is its own
                row = WaitRow.lock_if_free(session, begun.wait, listener)
                if row is None or not can_still_take(row, address, begun.generation):
                    continue
                row.ending = []
                assert row.row is not None and row.row.since is not None
                arrived = max(found.moment, row.row.since).timestamp()  # it may have been there long before
                sending.deliver(row, found.event, by=_BY, event_id=uuid.uuid4().hex, arrived=arrived)
        except Refusal as refusal:
            log.debug("%s cannot have what it looks for: %s", begun.wait.id, refusal)
            continue
        except DBAPIError:
            raise
        except Exception:
            log.warning("%s could not be given what it looks for", begun.wait.id, exc_info=True)
            continue
        ending += row.ending
        reached.append(begun.wait.id)
    tasks.end(session, ending, now())
    return reached


def _runs(of: Mapping[str, Any]) -> Select[Any]:
    query = select(
        DagRun.dag_id,
        DagRun.run_id,
        DagRun.run_type,
        DagRun.state.label("state"),
        DagRun.logical_date,
        DagRun.data_interval_start,
        DagRun.data_interval_end,
        DagRun.run_after,
        DagRun.start_date,
        DagRun.end_date,
        DagRun.partition_key,
        func.coalesce(DagRun.end_date, DagRun.updated_at).label("moment"),
    ).where(DagRun.dag_id == of["dag_id"], DagRun.state.in_(of["states"]))
    return _of_run(query, of)


def _run(row: Any) -> dict[str, Any]:
    return {
        "dag_id": row.dag_id,
        "run_id": row.run_id,
        "run_type": str(getattr(row.run_type, "value", row.run_type)),
        "state": str(getattr(row.state, "value", row.state)),
        **_times(
            row, "logical_date", "data_interval_start", "data_interval_end", "run_after", "start_date", "end_date"
        ),
        "partition_key": row.partition_key,
    }


def _tasks(of: Mapping[str, Any]) -> Select[Any]:
    ti = TaskInstance
    query: Any = (
        select(
            ti.dag_id,
            ti.run_id,
            ti.task_id,
            ti.map_index,
            ti.state,
            ti.try_number,
            ti.start_date,
            ti.end_date,
            ti.duration,
            DagRun.logical_date,
            func.coalesce(ti.end_date, ti.updated_at).label("moment"),
        )
        .join(DagRun, (DagRun.dag_id == ti.dag_id) & (DagRun.run_id == ti.run_id))
        .where(
            ti.dag_id == of["dag_id"],
            ti.task_id == of["task_id"],
            ti.map_index == of["map_index"],
            ti.state.in_(of["states"]),
        )
    )
    return _of_run(query, of)


def _task(row: Any) -> dict[str, Any]:
    return {
        "dag_id": row.dag_id,
        "run_id": row.run_id,
        "task_id": row.task_id,
        "map_index": row.map_index,
        "state": str(getattr(row.state, "value", row.state)),
        "try_number": row.try_number,
        **_times(row, "logical_date", "start_date", "end_date"),
        "duration": row.duration,
    }


def _of_run(query: Select[Any], of: Mapping[str, Any]) -> Select[Any]:
    if of["run_id"] is not None:
        query = query.where(DagRun.run_id == of["run_id"])
    if of["logical_date"] is not None:
        query = query.where(DagRun.logical_date == datetime.fromisoformat(of["logical_date"]))
    return query


def _assets(of: Mapping[str, Any]) -> Select[Any]:
    which = AssetModel.name == of["name"] if "name" in of else AssetModel.uri == of["uri"]
    query = (
        select(
            AssetModel.name,
            AssetModel.uri,
            AssetEvent.id,
            AssetEvent.extra,
            AssetEvent.partition_key,
            AssetEvent.source_dag_id,
            AssetEvent.source_run_id,
            AssetEvent.source_task_id,
            AssetEvent.source_map_index,
            AssetEvent.timestamp.label("moment"),
        )
        .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
        .where(which)
    )
    return query if of["partition"] is None else query.where(AssetEvent.partition_key == of["partition"])


def _asset(row: Any) -> dict[str, Any]:
    extra = row.extra
    try:
        sending.check_payload(extra)
    except Unfit as error:
        log.warning("The extra of the asset event %s is left out: %s", row.id, error)
        extra = None
    return {
        "id": row.id,
        "name": row.name,
        "uri": row.uri,
        "timestamp": row.moment.isoformat(),
        "extra": extra,
        "partition_key": row.partition_key,
        "source_dag_id": row.source_dag_id,
        "source_run_id": row.source_run_id,
        "source_task_id": row.source_task_id,
        "source_map_index": row.source_map_index,
    }


def _times(row: Any, *names: str) -> dict[str, str | None]:
    moments = {name: getattr(row, name) for name in names}
    return {name: None if moment is None else moment.isoformat() for name, moment in moments.items()}


_KINDS: Mapping[str, _Kind] = {
    "dag_run": _Kind(DagRunListener, _runs, _run),
    "task": _Kind(TaskListener, _tasks, _task),
    "asset": _Kind(AssetListener, _assets, _asset),
}
