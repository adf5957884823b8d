"""What the commands do. Like Airflow's own commands they use Airflow's database."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from airflow.cli.simple_table import AirflowConsole
from airflow.utils import cli as cli_utils
from airflow.utils.cli import suppress_logs_and_warning
from airflow.utils.helpers import ask_yesno
from airflow.utils.platform import getuser
from airflow.utils.providers_configuration_loader import providers_configuration_loaded
from airflow.utils.session import create_session
from airflow_events import waits
from airflow_events.inbox.database import in_transaction, lacks_tables
from airflow_events.inbox.rotation import rotate
from airflow_events.listeners.base import Wait
from airflow_events.listeners.support.values import json_of
from airflow_events.waits import Detail, Order, Stage, Summary
from rich.markup import escape
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

_T = TypeVar("_T")

# All but tabs and line ends.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_LONGEST_CALL = 100
"""Characters of a call in a list for people; ``show`` has all of them."""


def _in_one_line(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Let a command say in one line what is wrong with where it was typed, or with the database."""

    @functools.wraps(command)
    def run(args: argparse.Namespace) -> None:
        try:
            command(args)
        except EOFError:
            print("There is nobody to answer the question: give --yes", file=sys.stderr)
            raise SystemExit(2) from None
        except DBAPIError as error:
            if lacks_tables(error):
                raise SystemExit(
                    "The inbox has no tables, or of another version: run `airflow db migrate`"
                ) from None
            reason = " ".join(str(error.orig).split())
            raise SystemExit(f"Airflow's database does not carry it out: {reason}") from None

    return run


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def list_waits(args: argparse.Namespace) -> None:
    """List the waits of a stage."""
    with create_session() as session:
        page = waits.find(
            session,
            Stage(args.stage),
            dag_id=args.dag_id,
            run_id=args.run_id,
            task_id=args.task_id,
            listener=args.listener,
            text=args.text,
            order=Order(args.order) if args.order else None,
            descending=args.descending,
            limit=args.limit,
            offset=args.offset,
        )
    rows = [_row(wait) for wait in page.waits]
    _print(rows, args.output, long="waits_for")
    if args.output == "table" and page.more:
        left = f"of {page.total}" if page.total is not None else "and there are more"
        print(f"{len(page.waits)} {left}; see --limit and --offset")


@providers_configuration_loaded
@_in_one_line
@cli_utils.action_cli(check_db=False)  # type: ignore[untyped-decorator]
def rotate_fernet_key(args: argparse.Namespace) -> None:
    """Encrypt with the first Fernet key what waits without a trigger keep, and who has sent kept events."""
    done = rotate()
    print(f"{done.rotated} waits and kept events are encrypted with the first key")
    if done.unreadable:
        sys.exit(
            f"{done.unreadable} waits and kept events cannot be read with any of the keys: clear the waits, and "
            f"drop the events"
        )


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def list_starts(args: argparse.Namespace) -> None:
    """List what starts runs."""
    with create_session() as session:
        found = waits.starts(session, dag_ids=None if args.dag_id is None else [args.dag_id])
    rows = [
        {
            "dag_id": start.dag_id,
            "starts_on": start.asset,
            "state": start.state,
            "active": start.active,
            "up_to": start.up_to,
            "lag": start.lag,
            "last_event": _moment(start.last_event),
            "last_run": start.last_run,
            "triggerer": start.triggerer and start.triggerer.hostname,
            "trouble": start.trouble,
        }
        for start in found
    ]
    _print(rows, args.output, long="starts_on")


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def show_wait(args: argparse.Namespace) -> None:
    """Show one wait."""
    with create_session() as session:
        detail = waits.show(session, _key(args))
    if detail is None:
        raise SystemExit(f"{_name(args)} is not found, or does not wait for an event")
    rows = [_facts(detail)]
    if args.output in ("table", "plain"):
        rows = [{"what": name, "value": value} for name, value in rows[0].items() if value is not None]
    _print(rows, args.output)


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
@cli_utils.action_cli(check_db=False)  # type: ignore[untyped-decorator]
def forget_event(args: argparse.Namespace) -> None:
    """Forget the record of a wait, after a question."""
    question = f"Forget the event of {_name(args)}? A clear of the task then takes another event. [y/n]"
    if not args.yes and not ask_yesno(question):
        raise SystemExit("Nothing was forgotten")
    with create_session() as session:
        forgotten = waits.forget(session, _key(args), by=getuser())
    if forgotten is None:
        raise SystemExit(f"{_name(args)} is not found")
    if forgotten.refused:
        raise SystemExit(forgotten.refused)
    print(f"Forgotten. Clear the task to wait for another event: {_name(args)}")


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def list_kept(args: argparse.Namespace) -> None:
    """List the events that are kept for waits that have not begun."""
    with create_session() as session:
        found, total = waits.kept(session, key=args.key, limit=args.limit, offset=args.offset)
    rows = [
        {
            "event_id": one.event_id,
            "key": one.key,
            "event": json.dumps(one.event, ensure_ascii=False),
            "to": one.to,
            "sent_by": one.sent_by,
            "dags": None if one.dags is None else ", ".join(one.dags),
            "reached": ", ".join(one.reached) or None,
            "kept_at": _moment(one.kept_at),
            "expires": _moment(one.expires),
        }
        for one in found
    ]
    _print(rows, args.output, long="event")
    if args.output == "table" and total > args.offset + len(rows):
        print(f"{len(rows)} of {total}; see --limit and --offset")


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
@cli_utils.action_cli(check_db=False)  # type: ignore[untyped-decorator]
def drop_kept(args: argparse.Namespace) -> None:
    """Drop a kept event, after a question."""
    if not args.yes and not ask_yesno(f"Drop the kept event {args.event_id}? No wait gets it then. [y/n]"):
        raise SystemExit("Nothing was dropped")
    if not _in_inbox(lambda session: waits.drop(session, args.event_id)):
        raise SystemExit(f"no event {args.event_id} is kept: a wait may have it, or it has expired")
    print(f"Dropped: {args.event_id}")


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def send_event(args: argparse.Namespace) -> None:
    """
    Send an event to a wait.

    Airflow's audit log has what was sent by whom, and not the command with the event, which not all may read.
    """
    from airflow_events.api import sending

    try:
        payload = json_of(sys.stdin.read() if args.payload == "-" else args.payload)
    except (ValueError, RecursionError) as error:
        print(f"The payload is not valid JSON: {error}".replace("\n", " "), file=sys.stderr)
        raise SystemExit(2) from None
    event_id = uuid.uuid4().hex
    receipt = _in_inbox(
        lambda session: sending.send(
            session,
            Wait(*_key(args)),
            payload,
            by=getuser(),
            event_id=event_id,
            idempotency_key=args.idempotency_key,
        )
    )
    has_it = "The wait has it" if receipt.status == "delivered" else "It is kept until the wait begins"
    print(f"{has_it}: event {receipt.event_id}")


@suppress_logs_and_warning
@providers_configuration_loaded
@_in_one_line
def reject_wait(args: argparse.Namespace) -> None:
    """Fail a wait."""
    from airflow_events.api import sending

    outcome = _in_inbox(lambda session: sending.reject(session, Wait(*_key(args)), args.reason, by=getuser()))
    print("The task fails now" if outcome == "delivered" else "The task fails when it begins")


def _in_inbox(work: Callable[[Session], _T]) -> _T:
    from airflow_events.api.refusals import Refusal

    try:
        return in_transaction(work)
    except Refusal as refusal:
        again = "" if refusal.retry_after is None else f"; try again in {refusal.retry_after} s"
        raise SystemExit(f"{refusal}{again}") from None


def _key(args: argparse.Namespace) -> tuple[str, str, str, int]:
    return args.dag_id, args.run_id, args.task_id, args.map_index


def _name(args: argparse.Namespace) -> str:
    return "/".join(str(part) for part in _key(args))


def _print(rows: list[dict[str, Any]], output: str, *, long: str | None = None) -> None:
    """Print rows; for people without the columns that none of them has, and with the ``long`` one cut."""
    if output in ("table", "plain") and rows:
        rows = rows if long is None else [{**row, long: _cut(row[long])} for row in rows]
        names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        show = _as_letters if output == "plain" else lambda text: escape(_as_letters(text))  # rich has a markup
        rows = [{name: "" if row[name] is None else show(str(row[name])) for name in names} for row in rows]
    AirflowConsole().print_as(data=rows, output=output)


def _as_letters(text: str) -> str:
    """Return what somebody sent such that a terminal shows it and does nothing else with it."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= _LONGEST_CALL else f"{text[: _LONGEST_CALL - 1]}…"


def _row(wait: Summary) -> dict[str, Any]:
    return {
        "dag_id": wait.dag_id,
        "run_id": wait.run_id,
        "task_id": wait.task_id,
        "map_index": wait.map_index,
        "state": wait.state,
        "phase": wait.phase,
        "waits_for": wait.call or wait.listener,
        "arrived": _arrived(wait),
        "since": _moment(wait.since),
        "deadline": _moment(wait.deadline),
        "triggerer": wait.triggerer and wait.triggerer.hostname,
        "triggerer_alive": _has_triggerer(wait),
        "parked": wait.parked,
        "hosted": wait.hosted,
        "trouble": wait.trouble,
        "sign_of_life": _moment(wait.sign_of_life),
        "ended": _moment(wait.ended),
        "dag": wait.dag_state and wait.dag_state.value,
    }


def _arrived(wait: Summary) -> str | None:
    """How far a task has come that waits for many events; None of others."""
    if wait.arrived is None:
        return None
    return str(wait.arrived) if wait.wanted is None else f"{wait.arrived} of {wait.wanted}"


def _has_triggerer(wait: Summary) -> bool | None:
    """Whether a living triggerer has a deferred wait; None of others, and of those that need none."""
    if wait.state != "deferred" or wait.parked:
        return None
    return wait.triggerer is not None and wait.triggerer.alive


def _facts(detail: Detail) -> dict[str, Any]:
    steps = {
        f"step: {step.name}": f"{_moment(step.at) or '(time unknown)'} {step.note}"
        for step in detail.steps
        if step.done
    }
    record = detail.record
    event = None
    if record is not None and record.reason is None:
        event = record.preview or json.dumps(record.event, ensure_ascii=False)
    return {
        **_row(detail.summary),
        "process": detail.summary.holder,
        "stage": detail.summary.stage.value,
        "try_number": detail.summary.try_number,
        **steps,
        "event": event,
        "event_cut_from": record.length if record and record.preview else None,
        "trigger_error": detail.error,
        "can_be_forgotten": detail.cannot_forget or "yes",
    }


def _moment(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds") if moment else None
