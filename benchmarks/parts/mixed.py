"""Waits without a trigger of their own, many times as many as a triggerer can have with one: what they cost it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from parts import Part, Rows, Stage
from parts.connections import sockets_of
from parts.copies import copy_run, polled_for
from parts.processes import (
    busy,
    collected,
    connect,
    deferred,
    fresh_triggerer,
    open_files,
    open_waits,
    settle,
    supervisor_and_runner,
)
from parts.queues import KAFKA, send_at_once
from parts.timers import spread

# Waits in a run of the DAG, one of each kind. While they begin, Airflow sends the whole DAG for each.
IN_RUN = 3
DAG = f"mixed_{IN_RUN}"
# Messages that are sent one after another, those that are sent while there is no triggerer, and, of the waits that
# are there, those that get one at the same moment: without a task that follows, and with one.
ALONE = 20
IN_ABSENCE = 100
AT_ONCE = 10_000
FOLLOWED = 1000
# Seconds that the last of anything may take.
LONGEST = 1200


def mixed(stage: Stage) -> Rows:
    """Have a third of them each of timers, keys, and watches of one topic, and see what the triggerer does."""
    from deployment import until

    airflow, look = stage.airflow, stage.options.look
    broker = stage.brokers[KAFKA[1]]
    broker.fresh()
    triggerer = fresh_triggerer(airflow)
    settle()
    empty = _cores(triggerer, look)
    memory, files, sockets_before = collected(airflow, triggerer), open_files(triggerer[0]), sockets_of(broker)

    # What is sent to some alone is for a run each.
    count = max(max(stage.options.waits) // IN_RUN, 8 * ALONE) * IN_RUN
    began = time.monotonic()
    runs = open_waits(airflow, DAG, IN_RUN, count, queue=broker.queue)
    until(lambda: without_trigger(stage, count), f"{count} wait", timeout=60 + count, pause=1)
    until_all_wait = time.monotonic() - began
    print(f"{count} wait after {until_all_wait:.0f} s", flush=True)
    copied = stage.options.copies // IN_RUN
    began = time.monotonic()
    runs[:0] = copy_run(airflow, runs[-1], copied)
    until(
        lambda: sum(polled_for(airflow).values()) >= len(runs),
        f"{copied} copies are polled for",
        timeout=LONGEST,
        pause=1,
    )
    until_polled = round(time.monotonic() - began, 1)
    print(f"{copied} more runs after {until_polled} s", flush=True)
    for _ in range(6):
        settle()
    now = collected(airflow, triggerer)
    found: dict[str, Any] = {
        "waits": count + copied * IN_RUN,
        "begun": count,
        "look": look,
        "until_all_wait": round(until_all_wait, 1),
        "until_polled": until_polled,
        "supervisor": now[0] - memory[0],
        "runner": now[1] - memory[1],
        "files": open_files(triggerer[0]) - files,
        "connections": sockets_of(broker) - sockets_before,
        "triggers": _count(stage, "SELECT count(*) FROM trigger"),
        "empty_cores": empty,
        "cores": _cores(triggerer, look),
    }
    print(found, flush=True)
    turn = iter(runs)
    found["alone"] = [_alone(stage, next(turn), "watch") for _ in range(ALONE)]
    found["http"] = [_alone(stage, next(turn), "http") for _ in range(ALONE)]
    print(found["alone"], found["http"], flush=True)
    absent = [(next(turn).run_id, "watch") for _ in range(min(IN_ABSENCE, len(runs) // 4))]
    found["after_kill"], found["polled_again"] = _after_kill(stage, absent)
    settle()
    taken_over = collected(airflow, supervisor_and_runner(airflow.components["triggerer"]))
    found["runner_again"] = taken_over[1] - memory[1]
    rest = [(run.run_id, "watch") for run in turn]
    followed = min(len(rest) // 2, FOLLOWED)
    # Of a paused DAG no task follows, whose process would take the cores that the waits end with.
    found["at_once"] = _at_once(stage, rest[followed:][:AT_ONCE], paused=True)
    found["followed"] = _at_once(stage, rest[:followed], paused=False)
    return [found]


def _at_once(stage: Stage, waits: Sequence[tuple[str, str]], *, paused: bool) -> dict[str, float]:
    """Send a message to each of the waits; return how many they are, and when first, median and last had ended."""
    airflow = stage.airflow
    airflow.api("PATCH", f"/dags/{DAG}", {"is_paused": paused})
    settle()
    begin = datetime.now(timezone.utc)
    _send(stage.brokers[KAFKA[1]], waits)
    ends = _ends(stage, waits, begin)
    found = {"count": len(ends), "first": ends[0], "median": statistics.median(ends), "last": ends[-1]}
    print(f"paused: {paused}", found, flush=True)
    return found


def _alone(stage: Stage, run: Any, task: str) -> list[float]:
    """Return the seconds from an event to its wait's success, and to when the next task is queued."""
    begin = datetime.now(timezone.utc)
    if task == "watch":
        _send(stage.brokers[KAFKA[1]], [(run.run_id, task)])
    else:
        stage.airflow.request("POST", f"{stage.airflow.url}/events/keys/{run.run_id}-{task}", {"order": 1})
    [success] = _ends(stage, [(run.run_id, task)], begin)
    query = "SELECT queued_dttm FROM task_instance WHERE run_id = %s AND task_id = %s"
    after = f"after_{task}"
    queued = None
    while queued is None:
        time.sleep(0.1)
        assert (datetime.now(timezone.utc) - begin).total_seconds() < LONGEST, f"{after} of {run} is not queued"
        with connect(stage.postgres.url) as connection:
            [(queued,)] = connection.execute(query, (run.run_id, after))
    return [success, round((queued - begin).total_seconds(), 3)]


def _after_kill(stage: Stage, waits: Sequence[tuple[str, str]]) -> tuple[list[float], float]:
    """
    Kill the triggerer, start one, and send meanwhile.

    :return: how long after the kill each wait has ended, and after how long all others are polled for again.
    """
    from deployment import until

    # What follows a message is a task, whose process would take the cores.
    stage.airflow.api("PATCH", f"/dags/{DAG}", {"is_paused": True})
    before = polled_for(stage.airflow)
    stage.airflow.components["triggerer"].kill()
    killed = datetime.now(timezone.utc)
    _send(stage.brokers[KAFKA[1]], waits)
    stage.airflow.start_one("triggerer")
    moved: set[bytes] = set()

    def have_moved() -> bool:
        now = polled_for(stage.airflow)
        moved.update(host for host, count in before.items() if now[host] < count)
        return len(moved) == len(before)

    until(have_moved, "another has all hosts", timeout=LONGEST, pause=0.05)
    left = sum(before.values()) - len(waits)
    until(
        lambda: sum(polled_for(stage.airflow).values()) >= left,
        "all are polled for again",
        timeout=LONGEST,
        pause=0.1,
    )
    polled_again = round((datetime.now(timezone.utc) - killed).total_seconds(), 1)
    ends = _ends(stage, waits, killed)
    print(f"the last of {len(waits)} after {ends[-1]:.1f} s, all polled for after {polled_again} s", flush=True)
    return ends, polled_again


def _send(broker: Any, waits: Sequence[tuple[str, str]]) -> None:
    send_at_once(broker, [{"order": f"{run} {task}"} for run, task in waits])


def _ends(stage: Stage, waits: Sequence[tuple[str, str]], begin: datetime) -> list[float]:
    """Return how long after ``begin`` each of these waits has succeeded, in their order."""
    query = (
        "SELECT end_date FROM task_instance JOIN unnest(%s::text[], %s::text[]) AS wanted (run, task) "
        "ON run_id = run AND task_id = task WHERE state = 'success'"
    )
    runs, tasks = (list(each) for each in zip(*waits, strict=True))
    while True:
        with connect(stage.postgres.url) as connection:
            ends = [moment for (moment,) in connection.execute(query, (runs, tasks))]
        if len(ends) == len(waits):
            return sorted(round((moment - begin).total_seconds(), 3) for moment in ends)
        assert (datetime.now(timezone.utc) - begin).total_seconds() < LONGEST, f"{len(ends)} of {len(waits)}"
        time.sleep(0.05 if len(waits) == 1 else 0.5)


def without_trigger(stage: Stage, count: int) -> bool:
    """Whether so many wait, and none of them has a trigger but the hosts' anchors."""
    with_trigger, without = deferred(stage.airflow)
    hosts = _count(stage, "SELECT count(*) FROM event_host WHERE trigger_id IS NOT NULL")
    return with_trigger + without == count and with_trigger <= hosts


def _cores(triggerer: tuple[Any, Any], seconds: float) -> list[float]:
    """Return how much of a core supervisor and runner take while nothing happens."""
    before = [busy(process) for process in triggerer]
    time.sleep(seconds)
    return [round((busy(process) - was) / seconds, 4) for process, was in zip(triggerer, before, strict=True)]


def _count(stage: Stage, query: str) -> int:
    with connect(stage.postgres.url) as connection:
        [(count,)] = connection.execute(query)
    return int(count)


def table(rows: Rows) -> str:
    [row] = rows
    count = row["waits"]
    to_success, to_queued = zip(*row["alone"], strict=True)
    http_success, http_queued = zip(*row["http"], strict=True)
    lines = [
        f"| {count:,} open waits, a third each: `TimerListener`, `HttpListener`, `KafkaWatchListener` | |",
        "|---|---|",
        f"| until {row['begun']:,} that begin wait | {row['until_all_wait']:.0f} s, "
        f"{row['begun'] / row['until_all_wait']:.0f} a second |",
        *(_of_copies(row) if row["begun"] < count else ()),
        f"| memory of the runner, above one that has none | {row['runner'] / 1024:.0f} MB, "
        f"{row['runner'] / count:.1f} KB each |",
        f"| of its supervisor | {row['supervisor'] / 1024:.0f} MB, {row['supervisor'] / count:.1f} KB each |",
        f"| more open files of the supervisor; rows of triggers; connections to Kafka | {row['files']}; "
        f"{row['triggers']}; {row['connections']} |",
        f"| cores at rest, supervisor and runner; without a wait | {_two(row['cores'])}; "
        f"{_two(row['empty_cores'])} |",
        f"| a message to one of the watches: to success; to the next task queued | {spread(to_success)}; "
        f"{spread(to_queued)} |",
        f"| an event over HTTP to one of the keys, likewise | {spread(http_success)}; {spread(http_queued)} |",
        "| the triggerer is killed, and one started, to which Airflow gives the dead one's triggers after 30 s: "
        f"the last of {len(row['after_kill'])} messages sent meanwhile has ended its wait, from the kill | "
        f"{row['after_kill'][-1]:.1f} s |",
        f"| and all others are polled for again | {row['polled_again']:.1f} s |",
        f"| memory of that runner, likewise | {row['runner_again'] / 1024:.0f} MB, "
        f"{row['runner_again'] / count:.1f} KB each |",
        "| messages at once, for a wait each, with the DAG paused, so that no task follows: first, median, last "
        f"success | {_burst(row['at_once'])} |",
        "| others, each followed by a task in a process of its own, on the same cores | "
        f"{_burst(row['followed'])} |",
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"One triggerer. Runs of a DAG with {IN_RUN} waits. PSS after a collection; at rest is over "
            f"{row['look']:g} s. Median (least to most) of {len(row['alone'])}, one after another.",
        ]
    )


def _of_copies(row: dict[str, Any]) -> list[str]:
    copied = row["waits"] - row["begun"]
    return [
        f"| until the watches of {copied:,} others are polled for, which are copies of a run in Airflow's tables, "
        f"from when that is begun | {row['until_polled']:.0f} s |"
    ]


def _burst(found: dict[str, float]) -> str:
    return (
        f"{found['count']:,} messages: {found['first']:.1f} s, {found['median']:.1f} s, {found['last']:.1f} s; "
        f"{found['count'] / found['last']:,.0f} a second"
    )


def _two(cores: Sequence[float]) -> str:
    return ", ".join(f"{each:.3f}" for each in cores)


PARTS = {"mixed": Part(mixed, table, (DAG,), (KAFKA,))}
