"""What Airflow's own requests take while many read the waits and send events, beside readers of Airflow's own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from parts import Part, Rows, Stage
from parts.mixed import IN_RUN, without_trigger
from parts.processes import connect, open_waits, settle
from parts.queues import KAFKA

READERS = SENDERS = 60
# Seconds between two looks of the page at its list.
LOOKS = 5.0
# Seconds between two events of a sender.
SELDOM, OFTEN = 10.0, 1.0
# Seconds between two requests of those that are timed.
_BETWEEN = 0.1
# Requests that are timed, of each kind, and the seconds after which none is waited for.
_TIMED, _LONGEST = 100, 60


@dataclass(frozen=True)
class Clients:
    """Who asks besides: how many, for what, and how many seconds each pauses between two requests."""

    count: int
    path: str
    pause: float


_READ = Clients(READERS, "/events/api/waits?stage=open&limit=50", LOOKS)
_SEND = "/events/keys/"
LOADS: dict[str, list[Clients]] = {
    "none": [],
    "peer": [Clients(READERS, "/api/v2/dags/~/dagRuns?limit=50", LOOKS)],
    "readers": [_READ],
    "seldom": [_READ, Clients(SENDERS, _SEND, SELDOM)],
    "often": [_READ, Clients(SENDERS, _SEND, OFTEN)],
}
NAMES = {
    "none": "nobody else",
    "peer": f"{READERS} who read Airflow's list of runs, each every {LOOKS:g} s",
    "readers": f"{READERS} who read the list of waits, likewise",
    "seldom": f"these, and {SENDERS} who send an event each {SELDOM:g} s",
    "often": f"these, and {SENDERS} who send an event each {OFTEN:g} s",
}


def load(stage: Stage) -> Rows:
    """Have open waits, a task that runs, and others who ask; and time the list of DAGs and a heartbeat."""
    from deployment import until

    airflow = stage.airflow
    broker = stage.brokers[KAFKA[1]]
    broker.fresh()
    count = max(stage.options.waits) // IN_RUN * IN_RUN
    keys = [
        f"{run.run_id}-http" for run in open_waits(airflow, f"mixed_{IN_RUN}", IN_RUN, count, queue=broker.queue)
    ]
    until(lambda: without_trigger(stage, count), f"{count} wait", timeout=60 + count, pause=1)
    run = airflow.run("runs")
    run.until_task("sleep", "running")
    # A task after each event would be a process on the same cores.
    airflow.api("PATCH", f"/dags/mixed_{IN_RUN}", {"is_paused": True})
    settle()
    beat = _heartbeat(stage, run.run_id)
    found: Rows = []
    for name, clients in LOADS.items():
        # A part of the keys is waited for; whatever comes to the others is kept.
        sends = any(each.path == _SEND for each in clients)
        mine = [keys.pop() for _ in range(min(len(keys), count // IN_RUN // 2))] if sends else []
        with _others(airflow, clients, mine) as answers:
            times = _times(airflow, beat)
        found.append({"name": name, "waits": count, **times, "answers": dict(answers)})
        print(found[-1], flush=True)
        settle()
    run.mark("sleep", "success")
    airflow.api("PATCH", f"/dags/mixed_{IN_RUN}", {"is_paused": False})
    return found


def _heartbeat(stage: Stage, run_id: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return address, body and headers of a heartbeat of the task that runs, as its worker sends it."""
    from airflow.api_fastapi.auth.tokens import JWTGenerator

    with connect(stage.postgres.url) as connection:
        [(ti, host, pid)] = connection.execute(
            "SELECT id, hostname, pid FROM task_instance WHERE run_id = %s", (run_id,)
        )
    secret = stage.airflow.environment["AIRFLOW__API_AUTH__JWT_SECRET"]
    generator = JWTGenerator(
        secret_key=secret, private_key=None, valid_for=3600, audience="urn:airflow.apache.org:task", issuer=None
    )
    headers = {"Authorization": f"Bearer {generator.generate({'sub': str(ti)})}"}
    return f"/execution/task-instances/{ti}/heartbeat", {"hostname": host, "pid": pid}, headers


@contextlib.contextmanager
def _others(airflow: Any, clients: list[Clients], keys: list[str]) -> Iterator[collections.Counter[str]]:
    """Have others ask meanwhile, from a process of their own; in the end it is known what they were answered."""
    answers: collections.Counter[str] = collections.Counter()
    if not clients:
        yield answers
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    asking = context.Process(target=_ask_all, args=(airflow.url, airflow.token, clients, keys, there))
    asking.start()
    there.close()
    try:
        here.recv()  # it has begun
        time.sleep(LOOKS)
        yield answers
        here.send(None)
        answers.update(here.recv())
    finally:
        asking.terminate()
        asking.join()


def _ask_all(url: str, token: str, clients: list[Clients], keys: list[str], told: Any) -> None:
    asyncio.run(_ask_until_told(url, token, clients, keys, told))


async def _ask_until_told(url: str, token: str, clients: list[Clients], keys: list[str], told: Any) -> None:
    import httpx

    answers: collections.Counter[str] = collections.Counter()
    others = iter(range(10**9))

    async def ask(client: httpx.AsyncClient, path: str, pause: float, first: float) -> None:
        await asyncio.sleep(first)
        while True:
            try:
                if path == _SEND:
                    key = keys.pop() if keys else f"nobody-{next(others)}"
                    answer = await client.post(f"{path}{key}", json={"order": 1})
                else:
                    answer = await client.get(path)
                answers[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                answers[type(error).__name__] += 1
            await asyncio.sleep(pause)

    connecting = {"timeout": 60, "limits": httpx.Limits(max_connections=None), "trust_env": False}
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, **connecting) as client:
        asking = [
            asyncio.create_task(ask(client, each.path, each.pause, each.pause * number / each.count))
            for each in clients
            for number in range(each.count)
        ]
        told.send(None)
        await asyncio.to_thread(told.recv)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    told.send(dict(answers))


def _times(airflow: Any, beat: tuple[str, dict[str, Any], dict[str, str]]) -> dict[str, list[float]]:
    """Return the seconds that the list of DAGs and the heartbeat took, one after another, sorted."""
    import httpx

    path, body, headers = beat
    found: dict[str, list[float]] = {"dags": [], "heartbeat": []}
    login = {"Authorization": f"Bearer {airflow.token}"}
    for _ in range(_TIMED):
        for kind, method, where, options in (
            ("dags", "GET", "/api/v2/dags?limit=50", {"headers": login}),
            ("heartbeat", "PUT", path, {"headers": headers, "json": body}),
        ):
            began = time.perf_counter()
            with contextlib.suppress(httpx.TimeoutException):  # it counts as long as it was waited for
                # Over a connection of its own: a server that is late closes one that was quiet meanwhile.
                options = {**options, "timeout": _LONGEST, "trust_env": False}
                httpx.request(method, f"{airflow.url}{where}", **options).raise_for_status()
            found[kind].append(time.perf_counter() - began)
            time.sleep(_BETWEEN)
    return {kind: sorted(round(each, 4) for each in times) for kind, times in found.items()}


def table(rows: Rows) -> str:
    quiet = rows[0]
    lines = [
        "| besides, there are | `/api/v2/dags`: median, nine of ten within | times as without | a heartbeat "
        "| times as without | answers to the others |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        cells = [NAMES[row["name"]]]
        for kind in ("dags", "heartbeat"):
            cells.append(f"{_middle(row[kind]):.0f} ms, {_ninth(row[kind]):.0f} ms")
            times = (each(row[kind]) / each(quiet[kind]) for each in (_middle, _ninth))
            cells.append("" if row is quiet else ", ".join(f"{each:.1f}" for each in times))
        cells.append(", ".join(f"{status}: {count:,}" for status, count in sorted(row["answers"].items())))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{quiet['waits']:,} open waits in a triggerer; one API server with one process, on the same cores as "
            f"all others; {_TIMED} requests of each kind, one after another. The DAG that waits is paused: an "
            "event ends its wait, and no task follows.",
        ]
    )


def _middle(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _ninth(seconds: list[float]) -> float:
    return 1000 * statistics.quantiles(seconds, n=10)[-1]


PARTS = {"load": Part(load, table, (f"mixed_{IN_RUN}", "runs"), (KAFKA,))}
