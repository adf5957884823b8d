"""The commands and their arguments. Every ``airflow`` command imports this, so it imports little."""

from __future__ import annotations

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

_WAIT = (
    Arg(("dag_id",), help="The id of the dag"),
    Arg(("run_id",), help="The id of the run"),
    Arg(("task_id",), help="The id of the task that waits"),
    Arg(("map_index",), nargs="?", type=int, default=-1, help="The map index, for a mapped task"),
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
            help="Look at the waits for events, end them, and forget what they recorded",
            subcommands=(
                ActionCommand(
                    name="list",
                    help="List waits",
                    func=lazy_load_command(f"{_COMMANDS}.list_waits"),
                    args=(
                        _STAGE,
                        Arg(("--dag-id",), help="Only waits of this dag"),
                        Arg(("--run-id",), help="Only waits of this run"),
                        Arg(("--task-id",), help="Only waits of this task"),
                        Arg(("--listener",), help="Only waits of this listener class"),
                        Arg(("--text",), help="Part of the id of dag, run or task, or of the listener's name"),
                        _ORDER,
                        Arg(("--descending",), action="store_true", default=None, help="Sort the other way round"),
                        Arg(("--limit",), type=int, default=100, help="How many at most (default: 100)"),
                        Arg(("--offset",), type=int, default=0, help="How many to leave out before them"),
                        ARG_OUTPUT,
                        ARG_VERBOSE,
                    ),
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
                            ("--idempotency-key",), help="Of two events with the same key the wait takes the first"
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
                        Arg(("--reason",), required=True, help="Why; the task's log has it"),
                        ARG_VERBOSE,
                    ),
                ),
            ),
        )
    ]
