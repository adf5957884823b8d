"""The commands and their arguments. Every ``airflow`` command imports this, so it imports little."""

from __future__ import annotations

import argparse
import contextlib

# Not used here: `airflow db reset` is a command too.
import airflow_events.inbox.dropping  # noqa: F401
from airflow.cli.cli_config import (
    ARG_OUTPUT,
    ARG_VERBOSE,
    ARG_YES,
    ActionCommand,
    Arg,
    GroupCommand,
    lazy_load_command,
)

_COMMANDS = "airflow_events.cli.commands"


class _Text:
    """A type of arguments: a text that every database takes, of so many characters at most."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(self, text: str) -> str:
        """Return ``text`` if it is one."""
        if "\0" in text or not _is_unicode(text):
            raise argparse.ArgumentTypeError("it contains a NUL or invalid characters")
        if not 0 < len(text) <= self._most:
            raise argparse.ArgumentTypeError(f"it must have 1 to {self._most} characters, not {len(text)}")
        return text


class _Integer:
    """A type of arguments: an integer in a range, both ends included."""

    def __init__(self, least: int, most: int) -> None:
        self._range = range(least, most + 1)

    def __call__(self, text: str) -> int:
        """Return the integer if ``text`` is one."""
        with contextlib.suppress(ValueError):
            if (number := int(text)) in self._range:
                return number
        raise argparse.ArgumentTypeError(f"it must be an integer from {self._range[0]} to {self._range[-1]}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not of the terminal's encoding
        return False
    return True


# As long as Airflow's columns.
_ID = _Text(250)
_MOST = Arg(("--limit",), type=_Integer(1, 100_000), default=100, help="Maximum number of rows (default: 100)")
_LEFT_OUT = Arg(("--offset",), type=_Integer(0, 10_000_000), default=0, help="Rows to skip before them")

_WAIT = (
    Arg(("dag_id",), type=_ID, help="The id of the dag"),
    Arg(("run_id",), type=_ID, help="The id of the run"),
    Arg(("task_id",), type=_ID, help="The id of the task that waits"),
    Arg(
        ("map_index",),
        nargs="?",
        type=_Integer(-1, 2**31 - 1),
        default=-1,
        help="The map index, for a mapped task",
    ),
)
_STAGE = Arg(
    ("--stage",),
    choices=("recorded", "open", "ended"),
    default="open",
    help="Which waits: those whose event is recorded and not committed, those that wait (default), or those that "
    "have ended",
)
_ORDER = Arg(
    ("--order",),
    choices=(
        "dag_id",
        "run_id",
        "task_id",
        "listener",
        "state",
        "since",
        "deadline",
        "triggerer",
        "sign_of_life",
        "ended",
    ),
    help="What to sort by (default: since, and of ended waits ended)",
)


def get_events_cli_commands() -> list[GroupCommand]:
    """Return ``airflow events``, for Airflow's command line."""
    return [
        GroupCommand(
            name="events",
            help="List and manage waits for events, and DAGs that events start",
            subcommands=(
                ActionCommand(
                    name="list",
                    help="List waits",
                    func=lazy_load_command(f"{_COMMANDS}.list_waits"),
                    args=(
                        _STAGE,
                        Arg(("--dag-id",), type=_ID, help="Only waits of this dag"),
                        Arg(("--run-id",), type=_ID, help="Only waits of this run"),
                        Arg(("--task-id",), type=_ID, help="Only waits of this task"),
                        Arg(("--listener",), type=_ID, help="Only waits of this listener class"),
                        Arg(
                            ("--text",),
                            type=_ID,
                            help="Part of the id of dag, run or task, or of the listener's name",
                        ),
                        _ORDER,
                        Arg(("--descending",), action="store_true", default=None, help="Sort in descending order"),
                        _MOST,
                        _LEFT_OUT,
                        ARG_OUTPUT,
                        ARG_VERBOSE,
                    ),
                ),
                ActionCommand(
                    name="starts",
                    help="List DAGs that events start: by which, whether there is room for a run, the last event",
                    func=lazy_load_command(f"{_COMMANDS}.list_starts"),
                    args=(Arg(("--dag-id",), type=_ID, help="Only runs of this dag"), ARG_OUTPUT, ARG_VERBOSE),
                ),
                ActionCommand(
                    name="show",
                    help="Show one wait: its life, its event, its trigger",
                    func=lazy_load_command(f"{_COMMANDS}.show_wait"),
                    args=(*_WAIT, ARG_OUTPUT, ARG_VERBOSE),
                ),
                ActionCommand(
                    name="forget",
                    help="Forget the event that a wait recorded, so that its next try or clear takes another",
                    func=lazy_load_command(f"{_COMMANDS}.forget_event"),
                    args=(*_WAIT, ARG_YES, ARG_VERBOSE),
                ),
                ActionCommand(
                    name="kept",
                    help="List events that are kept for a key until a wait for that key begins",
                    func=lazy_load_command(f"{_COMMANDS}.list_kept"),
                    args=(
                        Arg(("--key",), type=_Text(256), help="Only events of this key"),
                        _MOST,
                        _LEFT_OUT,
                        ARG_OUTPUT,
                        ARG_VERBOSE,
                    ),
                ),
                ActionCommand(
                    name="drop",
                    help="Drop an event that is kept, so that no wait gets it",
                    func=lazy_load_command(f"{_COMMANDS}.drop_kept"),
                    args=(
                        Arg(("event_id",), type=_Text(40), help="Its id, as `airflow events kept` has it"),
                        ARG_YES,
                        ARG_VERBOSE,
                    ),
                ),
                ActionCommand(
                    name="send",
                    help="Send an event to a wait for HTTP events",
                    func=lazy_load_command(f"{_COMMANDS}.send_event"),
                    args=(
                        *_WAIT,
                        Arg(
                            ("--payload",),
                            required=True,
                            help="The event, as JSON; - reads it from standard input",
                        ),
                        Arg(
                            ("--idempotency-key",),
                            type=_Text(200),
                            help="Requests with the same idempotency key count once",
                        ),
                        ARG_VERBOSE,
                    ),
                ),
                ActionCommand(
                    name="reject",
                    help="Fail a wait for HTTP events, without another try",
                    func=lazy_load_command(f"{_COMMANDS}.reject_wait"),
                    args=(
                        *_WAIT,
                        Arg(
                            ("--reason",),
                            type=_Text(2000),
                            required=True,
                            help="The reason, which is written to the task's log",
                        ),
                        ARG_VERBOSE,
                    ),
                ),
                ActionCommand(
                    name="rotate-fernet-key",
                    help="Encrypt again what waits and kept events keep, with the first of the Fernet keys",
                    description="To be run after `airflow rotate-fernet-key`, and before the old key is dropped. "
                    "Exits with 1 if one cannot be read with any of the keys.",
                    func=lazy_load_command(f"{_COMMANDS}.rotate_fernet_key"),
                    args=(ARG_VERBOSE,),
                ),
                ActionCommand(
                    name="doctor",
                    help="Check that triggerers can reach the inbox in the API server; say what to do if not",
                    description=(
                        "Looks for the tables, the key, the address, and what answers there. Run it where a "
                        "triggerer runs. Exits with 1 if something is wrong."
                    ),
                    func=lazy_load_command("airflow_events.cli.doctor.doctor"),
                    args=(ARG_VERBOSE,),
                ),
            ),
        )
    ]
