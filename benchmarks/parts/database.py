"""What triggerer, scheduler and API server ask Airflow's database, with more and more waits in it."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from parts import Part, Rows, Stage
from parts.copies import copy_rows
from parts.processes import connect, fresh_triggerer, open_waits, settle, until_open

# Waits that the triggerer has itself, meanwhile.
OWN = 10
# Ids of copies are from here on.
COPIES = 1_000_000_000
# Of the copies, each triggerer has so many: Airflow's default of `[triggerer] capacity`.
EACH = 1000
# What a query is for, by what only it has.
KINDS = {
    "triggerer": {
        "count its waits": r"SELECT count\(trigger\.id\)",
        "look for waits that nobody has": r"SELECT trigger\.id FROM trigger JOIN task_instance",
        "the same, callbacks and assets": r"SELECT trigger\.id FROM trigger (JOIN callback|WHERE \(EXISTS)",
        "list its waits": r"SELECT trigger\.id FROM trigger WHERE trigger\.triggerer_id",
        "let go of waits that ended": r"UPDATE task_instance SET .*trigger_id",
        "delete what nobody waits for": r"DELETE FROM trigger",
    },
    "scheduler": {
        "choose runs to look at": r"(?!.*'queued')SELECT dag_run\..* FROM dag_run JOIN dag .* LIMIT \d+ FOR",
        "find waits whose time is over": r"UPDATE task_instance .*trigger_timeout",
        "delete what nobody waits for": r"DELETE FROM trigger",
    },
    "api-server": {
        "look for parked waits that are due": r"SELECT event_wait\..* WHERE event_wait\.wake_at <=",
        "ask when the next one is": r"SELECT min\(event_wait\.wake_at\)",
        "look after hosts": r"SELECT event_host\.",
        "look for what waits seek in Airflow": r"SELECT .*event_wait\.sought",
    },
}
# Once in each loop.
LOOPS = {
    "triggerer": "delete what nobody waits for",
    "scheduler": "choose runs to look at",
    "api-server": "look for parked waits that are due",
}
LINE = re.compile(r"^QUERY \d+ LOG:  duration: ([\d.]+) ms  (?:statement|execute \S+): (.*)", re.DOTALL)


def database(stage: Stage) -> Rows:
    """Ask with more and more waits in the database. Comes last: it leaves Airflow ended, its tables full."""
    airflow, postgres = stage.airflow, stage.postgres
    triggerer = fresh_triggerer(airflow)
    [run] = open_waits(airflow, "floor_10", OWN, OWN)
    until_open(airflow, triggerer, OWN)
    settle()
    airflow.stop()
    found: Rows = []
    there = 0

    def ask(**of: Any) -> None:
        for name in KINDS:
            component = airflow.start_one(name)
            try:
                settle()
                settle()
                seen = _look(postgres, name, stage.options.look)
            finally:
                component.stop()
            found.append({"name": name, "others": there, **of, **seen})
            print(found[-1], flush=True)

    for others in sorted(stage.options.others):
        copy_waits(postgres, run, there, others)
        there = others
        ask(triggers=True)
    if there:
        take_triggers(postgres)
        ask(triggers=False)
    return found


def _look(postgres: Any, name: str, look: float) -> dict[str, Any]:
    """Write down the queries of a while, and return their number and the server's time for each loop."""
    log = Path(postgres.folder) / "postgres.log"
    _set(postgres, "log_line_prefix = 'QUERY %p '", "log_min_duration_statement = 0")
    read = log.stat().st_size
    began = time.monotonic()
    time.sleep(look)
    seconds = time.monotonic() - began
    with log.open(errors="replace") as lines:
        lines.seek(read)
        text = lines.read()
    _set(postgres, "log_min_duration_statement = -1")
    queries = [found for entry in re.split(r"(?m)^(?=QUERY )", text) if (found := LINE.match(entry))]
    count: Counter[str] = Counter()
    milliseconds: defaultdict[str, float] = defaultdict(float)
    for query in queries:
        kind = kind_of(name, query[2])
        count[kind] += 1
        milliseconds[kind] += float(query[1])
    loops = count[LOOPS[name]]
    assert loops, f"the {name} has asked nothing within {look} s"
    return {
        "seconds": round(seconds, 1),
        "loops": loops,
        "queries": round(sum(count.values()) / loops, 1),
        "ms": round(sum(milliseconds.values()) / loops, 3),
        "of it": {kind: round(milliseconds[kind] / loops, 3) for kind in [*KINDS[name], "the rest"]},
    }


def kind_of(name: str, query: str) -> str:
    text = " ".join(query.split())
    return next((kind for kind, pattern in KINDS[name].items() if re.match(pattern, text)), "the rest")


def _set(postgres: Any, *settings: str) -> None:
    with connect(postgres.url) as connection:
        for setting in settings:
            connection.execute(f"ALTER SYSTEM SET {setting}")
        connection.execute("SELECT pg_reload_conf()")
    time.sleep(1)


def copy_waits(postgres: Any, run: Any, first: int, last: int) -> None:
    """
    Put waits of other triggerers, which are alive, into Airflow's own tables: copies of a run that waits.

    :param first: how many there are.
    :param last: how many there will be.
    """
    ours = f"dag_id = '{run.dag_id}' AND run_id = '{run.run_id}'"
    runs = f"generate_series({first // OWN}, {last // OWN - 1}) AS copy"
    jobs = f"generate_series({-(-first // EACH)}, {-(-last // EACH) - 1}) AS copy"
    # Of the run's waits each has a number, by which its copies and those of its trigger find each other.
    number = f"{COPIES} + copy * {OWN} + nth"
    with connect(postgres.url) as connection:
        job = "id = (SELECT max(id) FROM job WHERE job_type = 'TriggererJob')"
        copy_rows(
            connection, "job", jobs, job, "id",
            id=f"{COPIES} + copy", state="'running'", end_date="NULL", latest_heartbeat="now() + interval '1 day'",
        )  # fmt: skip
        copy_rows(connection, "dag_run", runs, ours, "id", id=f"{COPIES} + copy", run_id="'copy' || copy")
        waits = f"id IN (SELECT trigger_id FROM task_instance WHERE {ours})"
        of_others = f"{COPIES} + copy * {OWN} / {EACH}"
        copy_rows(connection, "trigger", runs, waits, "id", id=number, triggerer_id=of_others)
        copy_rows(
            connection, "task_instance", runs, ours, "trigger_id",
            id="gen_random_uuid()", run_id="'copy' || copy", trigger_id=number,
        )  # fmt: skip
        connection.execute("VACUUM ANALYZE")


def take_triggers(postgres: Any) -> None:
    """Let the copies go on without triggers: every other one is parked for a year, and the others share hosts."""
    of_copies = f"task_instance.run_id LIKE 'copy%' AND task_instance.trigger_id >= {COPIES}"
    nth = f"task_instance.trigger_id - {COPIES}"
    with connect(postgres.url) as connection:
        connection.execute(
            f"""
            INSERT INTO event_wait (
                dag_id, task_id, run_id, map_index, place, listener, call, arguments, generation, holder, since,
                run_start, clears, parked, parked_try, wake_at, wake, host, hosted_at
            )
            SELECT
                dag_id, task_id, run_id, map_index, -1, 'Listener', 'Listener()', sha256('a'), 1, 'box:1', now(),
                now(), 0, repeat('k', 400), id::text, CASE WHEN even THEN now() + interval '1 year' END,
                CASE WHEN even THEN '{{}}' END, CASE WHEN NOT even THEN sha256(('host' || nth % 4)::bytea) END,
                CASE WHEN NOT even THEN now() END
            FROM (SELECT *, {nth} AS nth, ({nth}) % 2 = 0 AS even FROM task_instance WHERE {of_copies}) AS copy
            """
        )
        connection.execute(
            f"""
            INSERT INTO event_host (host, trigger_id)
            SELECT sha256(('host' || nth % 4)::bytea), min({COPIES} + nth)
            FROM (SELECT {nth} AS nth FROM task_instance WHERE {of_copies} AND ({nth}) % 2 = 1) AS copy GROUP BY 1
            """
        )
        anchors = "(SELECT trigger_id FROM event_host)"
        connection.execute(
            f"UPDATE task_instance SET trigger_id = NULL WHERE {of_copies} AND trigger_id NOT IN {anchors}"
        )
        connection.execute(f"DELETE FROM trigger WHERE id >= {COPIES} AND id NOT IN {anchors}")
        connection.execute(
            f"UPDATE trigger SET classpath = 'airflow_events.triggers.host.HostTrigger' WHERE id >= {COPIES}"
        )
        connection.execute("VACUUM ANALYZE")


def table(rows: Rows) -> str:
    lines = [
        "| alone with the database | waits of others in it | loops a second | queries in each "
        "| the server's time for each | most of it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, most = max(row["of it"].items(), key=lambda item: float(item[1]))
        lines.append(
            f"| {row['name']} | {_others(row)} | {row['loops'] / row['seconds']:.2f} | {row['queries']:.0f} "
            f"| {row['ms']:,.1f} ms | {kind}: {most:,.1f} ms |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Measured: the queries of {rows[0]['seconds']:.0f} s, as PostgreSQL wrote them down with their "
            f"time. The triggerer has {OWN} waits itself; the others' are rows of Airflow's own tables, {EACH:,} "
            f"to a triggerer that is alive and {OWN} to a run. Without triggers, half of them are parked for a "
            "year, and the others share four hosts. Nothing happens meanwhile.",
        ]
    )


def _others(row: dict[str, Any]) -> str:
    if row.get("triggers", True):
        return f"{row['others']:,}"
    return f"{row['others']:,}, parked and hosted"


PARTS = {"database": Part(database, table, ("floor_10",))}
