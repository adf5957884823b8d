"""``airflow events`` with whatever somebody may type: one line that says what is wrong, and never a traceback."""

from __future__ import annotations

import contextlib
import functools
import io

import pytest
from airflow.cli.cli_parser import get_parser
from airflow_events.cli.commands import _print
from airflow_events.cli.definition import get_events_cli_commands
from examples import of_examples
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

[EVENTS] = get_events_cli_commands()
COMMANDS = [command for command in EVENTS.subcommands if command.name != "doctor"]
NASTY = [
    "", " ", "-", "--", "-1", "-2", "0", "1e3", "9" * 400, "2147483648", "1_000", "\u0663", "a\0b", "\udcff",
    "x" * 251, "x" * 5000, "é🎉", "%s{0}\\", "' OR 1=1 --", "\n", "shop", "run_1", "wait_1", "null", "{}",
    "[" * 5000, "NaN", '"\\ud800"', "=", "@file", "$(id)", "table", "json", "open", "ended", "since",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec=None, categories=None), max_size=12))
FLAGS = sorted({flag for command in COMMANDS for arg in command.args for flag in arg.flags if flag[0] == "-"})


@st.composite
def lines(draw):
    """A command and arguments, of which many are what it takes, in an order that it takes or not."""
    command = draw(st.sampled_from(COMMANDS))
    line = [draw(WORDS) for arg in command.args if arg.flags[0][0] != "-" and draw(st.integers(0, 5))]
    for flag in draw(st.lists(st.sampled_from(FLAGS), max_size=3)):
        line += [flag, draw(WORDS)][: draw(st.integers(1, 2))]
    if command.name == "send" and draw(st.booleans()):
        line += ["--payload", draw(WORDS)]
    if command.name == "reject" and draw(st.booleans()):
        line += ["--reason", draw(WORDS)]
    return ["events", command.name, *line]


_parser = functools.cache(get_parser)  # which takes a second


def typed(line):
    """Return the exit code of a command, and what it wrote to standard error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            arguments = _parser().parse_args(line)
            arguments.func(arguments)
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=said)
                return 1, said.getvalue()
            return end.code or 0, said.getvalue()
    return 0, said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def database(server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW__DATABASE__CHECK_MIGRATIONS", "False")
        patch.setattr("sys.stdin", io.StringIO(""))
        server.waits.add("key")
        server.session.commit()
        yield


@of_examples(150)
@given(line=lines())
def test_whatever_is_typed(line):
    code, said = typed(line)
    assert code in (0, 1, 2)
    assert "Traceback" not in said
    if code:  # one line, but for the ends of lines in what was typed
        assert len(said.strip().splitlines()) <= 1 + sum(len(f"x{word}x".splitlines()) - 1 for word in line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["show", "shop", "run", "wait", "x"], "map_index: it must be an integer from -1 to 2147483647"),
        (["show", "shop", "run", "wait", "2147483648"], "map_index: it must be"),
        (["show", "shop", "run", "wait", "--", "-2"], "map_index: it must be"),
        (["show", "", "run", "wait"], "dag_id: it must have 1 to 250 characters, not 0"),
        (["show", "shop", "x" * 251, "wait"], "run_id: it must have 1 to 250 characters, not 251"),
        (["show", "shop", "run", "a\0"], "task_id: it contains a NUL"),
        (["show", "shop", "run", "\udcff"], "task_id: it contains a NUL or invalid characters"),
        (["show", "shop"], "the following arguments are required: run_id, task_id"),
        (["list", "--limit", "0"], "--limit: it must be an integer from 1"),
        (["list", "--limit", "9" * 5000], "--limit: it must be an integer from 1"),
        (["list", "--offset", "-1"], "--offset: "),
        (["list", "--stage", "lost"], "--stage: invalid choice"),
        (["list", "--text", "\0"], "--text: "),
        (["send", "shop", "run", "wait", "--payload", "{"], "The payload is not valid JSON"),
        (["send", "shop", "run", "wait", "--payload", '{"price": NaN}'], "valid JSON: JSON has no NaN"),
        (["send", "shop", "run", "wait", "--payload", "[" * 100_000], "The payload is not valid JSON"),
        (["send", "shop", "run", "wait", "--payload", "1", "--idempotency-key", ""], "--idempotency-key: "),
        (["reject", "shop", "run", "wait", "--reason", ""], "--reason: "),
        (["lose"], "invalid choice: 'lose'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_with_exit_code_2(line, said):
    code, error = typed(["events", *line])
    assert code == 2
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("line", [["drop", "no-such"], ["forget", "shop", "run_1", "wait_1"]])
def test_a_question_that_nobody_can_answer_is_said_so(line):
    """In a pipe, or in cron."""
    assert typed(["events", *line]) == (2, "There is nobody to answer the question: give --yes\n")


def test_what_the_database_says_is_one_line(monkeypatch):
    empty = create_engine("sqlite://")
    monkeypatch.setattr("airflow_events.cli.commands.create_session", lambda: Session(empty))
    code, error = typed(["events", "list"])
    assert (code, error.strip()) == (
        1, "The inbox has no tables, or of another version: run `airflow db migrate`"
    )  # fmt: skip
    unreachable = create_engine("sqlite:////no/such/folder/airflow.db")
    monkeypatch.setattr("airflow_events.cli.commands.create_session", lambda: Session(unreachable))
    code, error = typed(["events", "list"])
    assert code == 1 and error.strip() == (
        "Airflow's database does not carry it out: unable to open database file"
    )  # fmt: skip


@pytest.mark.parametrize("line", [["drop", "no-such", "--yes"], ["forget", "shop", "run", "wait", "--yes"]])
def test_what_airflow_notes_of_a_command_adds_nothing_to_it(monkeypatch, line):
    """Airflow's own check of the database ends in a traceback where there is none."""
    monkeypatch.setenv("AIRFLOW__DATABASE__CHECK_MIGRATIONS", "True")
    unreachable = create_engine("sqlite:////no/such/folder/airflow.db")
    monkeypatch.setattr("airflow.utils.db.check_and_run_migrations", unreachable.connect)
    for module in ("cli.commands", "inbox.database"):
        session = lambda scoped=False: Session(unreachable)  # noqa: E731
        monkeypatch.setattr(f"airflow_events.{module}.create_session", session)
    code, error = typed(["events", *line])
    assert (code, error.strip()) == (
        1, "Airflow's database does not carry it out: unable to open database file"
    )  # fmt: skip


def test_what_cannot_be_done_now_is_another_exit_code(monkeypatch):
    code, error = typed(["events", "send", "shop", "no", "such", "--payload", "1"])
    assert (code, error.strip()) == (1, "there is no task instance shop/no/such/-1")
    code, error = typed(["events", "drop", "no-such", "--yes"])
    assert (code, error.strip()) == (1, "no event no-such is kept: a wait may have it, or it has expired")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, error = typed(["events", "drop", "no-such"])
    assert (code, error.strip()) == (1, "Nothing was dropped")
    code, error = typed(["events", "reject", "shop", "run_1", "wait_1", "--reason", " "])
    assert (code, error.strip()) == (1, "a rejection needs a reason")


SENT = "[/x] [link=https://elsewhere] [a-z]*.csv \x1b]0;title\x07 \x9b2J \\"


@pytest.mark.parametrize("output", ["table", "plain"])
def test_what_somebody_has_sent_is_printed_and_not_obeyed(output, capsys):
    _print([{"key": SENT, "event": SENT}], output, long="event")
    said = capsys.readouterr().out
    shown = SENT.replace("\x1b", r"\x1b").replace("\x07", r"\x07").replace("\x9b", r"\x9b")
    assert said.count(shown) == 2


def test_a_key_that_looks_like_markup_is_listed(server):
    kept = server.client(server.token("USER")).post("/events/keys/%5B%2Fx%5D", json={"comment": "see [/docs]"})
    assert kept.status_code == 202
    assert typed(["events", "kept"]) == (0, "")
