"""Messages at a steady rate, over waits of which another begins for each that ends: does anything pile up?"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from parts import Part, Rows, Stage
from parts.copies import NOBODY, copy_run, holders, join
from parts.processes import busy, connect, fresh_triggerer, settle
from parts.queues import KAFKA, send_at_once

# How often in a second messages are sent.
TICKS = 5
# Seconds that the last of anything may take.
LONGEST = 120


def steady(stage: Stage) -> Rows:
    """
    Send messages for some minutes, and let as many waits join as have got one.

    These are copies of one wait, of which the host knows nothing before: Airflow itself starts some tasks a second
    only, on the same cores.
    """
    from deployment import until

    airflow, rate, minutes = stage.airflow, stage.options.rate, stage.options.minutes
    open_ones, sent_in_all = max(stage.options.waits), rate * 60 * minutes
    broker = stage.brokers[KAFKA[1]]
    broker.fresh()
    triggerer = fresh_triggerer(airflow)
    run = airflow.run("steady", {"queue": broker.queue})
    until(lambda: holders(airflow, "steady"), "the first one is hosted", LONGEST)
    airflow.api("PATCH", "/dags/steady", {"is_paused": True})
    copies = copy_run(airflow, run, open_ones + sent_in_all, hosted=False)
    print(f"{len(copies)} copies are made", flush=True)
    with connect(stage.postgres.url) as connection:
        join(connection, "steady", copies[: open_ones - 1])
    until(lambda: NOBODY not in holders(airflow, "steady"), "they are polled for", LONGEST, pause=1)
    settle()

    worked = [busy(process) for process in triggerer]
    began, sent, joined = time.monotonic(), 0, open_ones - 1
    with connect(stage.postgres.url) as connection:
        while sent < sent_in_all:
            due = min(int((time.monotonic() - began) * rate) + 1, sent_in_all)
            now = time.time()
            send_at_once(broker, [{"order": f"{number}", "sent": now} for number in range(sent, due)])
            sent = due
            if (ended := _ended(connection)) > joined + 1 - open_ones:
                there = ended + open_ones - 1
                join(connection, "steady", copies[joined:there])
                joined = there
            time.sleep(1 / TICKS)
        took = time.monotonic() - began
        until(lambda: _ended(connection) >= sent_in_all, "all have ended", LONGEST, pause=0.5)
        cores = [round((busy(process) - was) / took, 3) for process, was in zip(triggerer, worked, strict=True)]
        latencies = _latencies(connection)
    by_minute = [
        [latency for at, latency in latencies if minute * 60 <= at - latencies[0][0] < (minute + 1) * 60]
        for minute in range(minutes)
    ]
    found = {
        "open": open_ones,
        "rate": rate,
        "minutes": minutes,
        "messages": sent_in_all,
        "ended": len(latencies),
        "by_minute": [
            {"median": statistics.median(each), "p99": statistics.quantiles(each, n=100)[98], "most": max(each)}
            for each in by_minute
        ],
        "cores": cores,
    }
    print(found, flush=True)
    return [found]


def _ended(connection: Any) -> int:
    query = "SELECT count(*) FROM task_instance WHERE dag_id = 'steady' AND state = 'success'"
    [(count,)] = connection.execute(query)
    return int(count)


def _latencies(connection: Any) -> list[tuple[float, float]]:
    """Return when each message was sent, and after how many seconds the wait that has it had succeeded."""
    from airflow_events.listeners.support import serde

    query = (
        "SELECT event, end_date FROM event_wait JOIN task_instance USING (dag_id, run_id, task_id, map_index) "
        "WHERE dag_id = 'steady' AND state = 'success'"
    )
    found = {}
    for event, end in connection.execute(query):
        value = serde.decode(event)["value"]
        assert value["order"] not in found, f"two waits have {json.dumps(value)}"
        found[value["order"]] = value["sent"], round(end.timestamp() - value["sent"], 3)
    return sorted(found.values())


def table(rows: Rows) -> str:
    [row] = rows
    lines = [
        f"| {row['rate']} messages a second, {row['open']:,} open waits | "
        + " | ".join(f"minute {number}" for number in range(1, row["minutes"] + 1))
        + " |",
        "|---" * (row["minutes"] + 1) + "|",
    ]
    for name, what in (
        ("median", "sent to success: median"),
        ("p99", "99 of 100 within"),
        ("most", "the longest"),
    ):
        lines.append(f"| {what} | " + " | ".join(f"{each[name]:.2f} s" for each in row["by_minute"]) + " |")
    supervisor, runner = row["cores"]
    return "\n".join(
        [
            *lines,
            "",
            f"{row['messages']:,} messages, and {row['ended']:,} waits that have one each, of Kafka and with one "
            f"triggerer. Its supervisor took {supervisor:.2f} of a core, its runner {runner:.2f}.",
        ]
    )


PARTS = {"steady": Part(steady, table, ("steady",), (KAFKA,))}
