#!/usr/bin/env python3
"""
Let many send events while API servers are restarted: python3 scripts/senders.py [--events 2000].

Two API servers with four processes each behind a balancer, two triggerers, PostgreSQL. Half of the events are sent
before their waits begin. Some senders hang up, some send to a key that another one sends to as well. In the end it
compares what each sender was told with what the tasks got.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import bootstrap

STAGE = bootstrap.ROOT / "scripts" / "stage"
EACH = 50  # waits in a run, as stage/orders.py has it
# Of so many events one sender hangs up before it is answered, and of so many another one has a rival.
HANGS_UP, HAS_RIVAL = 10, 20
_AGAIN = (425, 429, 502, 503, 504)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many senders, and API servers that are restarted meanwhile.")
    parser.add_argument("--events", type=int, default=2000, help="how many keys, a multiple of 50 (default: 2000)")
    parser.add_argument("--senders", type=int, default=50, help="how many send at a time (default: 50)")
    parser.add_argument("--pace", type=float, default=3, help="mean seconds between two events of a sender")
    parser.add_argument("--processes", type=int, default=4, help="of each API server (default: 4)")
    parser.add_argument("--database", choices=("postgres", "mysql"), default="postgres")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bootstrap.run_inside("[test]")
    from databases import missing, serve
    from deployment import Deployment, free_port

    if problem := missing(options.database):
        bootstrap.fail(problem)
    random.seed(options.seed)
    ports = [free_port(), free_port()]
    with (
        tempfile.TemporaryDirectory(prefix="airflow-events-senders-") as home,
        serve(options.database) as database,
        Deployment(Path(home), database=database and database.url) as airflow,
    ):
        airflow.prepare()
        airflow.add_dags(STAGE / "orders.py")
        sys.exit(asyncio.run(Senders(airflow, ports, options).run()))


class Balancer:
    """Gives each connection to the next server that takes it."""

    def __init__(self, port: int, servers: list[int]) -> None:
        self._port = port
        self._servers = itertools.cycle(servers)
        self._count = len(servers)

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # those that are open in the end
            await self._connect(reader, writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(self._count):
                with contextlib.suppress(OSError):
                    from_server, to_server = await asyncio.open_connection("127.0.0.1", next(self._servers))
                    await asyncio.gather(_pipe(reader, to_server), _pipe(from_server, writer))
                    return
        finally:
            writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class Senders:
    """
    Everybody who sends, and what they were told.

    :ivar told: by key, of each event that was sent there its id and the statuses that its sender was told.
    :ivar seen: how often each status, or the lack of an answer, was seen.
    """

    def __init__(self, airflow, ports: list[int], options: argparse.Namespace) -> None:
        self._airflow, self._ports, self._options = airflow, ports, options
        self._names = ["api-server", "api-server@2"]
        self.told: dict[int, dict[str, list[int]]] = collections.defaultdict(dict)
        self.seen: collections.Counter[str] = collections.Counter()
        self.restarts: collections.Counter[str] = collections.Counter()
        self._faults: list[str] = []
        self._all_up = asyncio.Lock()

    async def run(self) -> int:
        begun = time.monotonic()
        async with Balancer(self._airflow.port, self._ports):
            await asyncio.to_thread(self._start)
            restarting = asyncio.create_task(self._restart())
            numbers = list(range(self._options.events))
            random.shuffle(numbers)
            half = len(numbers) // 2
            await self._send_all(numbers[:half])
            async with self._all_up:  # or it would not be known whether there is a run
                runs = await asyncio.to_thread(self._begin)
            await self._send_all(numbers[half:])
            restarting.cancel()
            await asyncio.wait({restarting})
            await asyncio.to_thread(self._bring_up)
            states, got = await asyncio.to_thread(self._end, runs)
        return self._judge(states, got, time.monotonic() - begun)

    def _start(self) -> None:
        from deployment import until

        for name in self._names:
            self._serve(name)
        self._airflow.start_one("scheduler")
        self._airflow.start_one("dag-processor")
        for label in ("triggerer", "triggerer@2"):
            self._airflow.start_one("triggerer", as_name=label)
        until(self._airflow.answers, "the API servers answer")
        self._airflow.wait_for_dags("orders")
        print(f"{len(self._names)} API servers, {self._options.processes} processes each", flush=True)

    def _serve(self, name: str) -> None:
        port = self._ports[self._names.index(name)]
        self._airflow.start_one(f"api-server --port {port} --workers {self._options.processes}", as_name=name)

    def _begin(self) -> list:
        runs = [self._airflow.run("orders", {"part": part}) for part in range(self._options.events // EACH)]
        print("the waits begin", flush=True)
        return runs

    def _end(self, runs: list) -> tuple[set[str], dict[int, list[str]]]:
        """Return the states of the runs, and by key the ids of the events that tasks got."""
        try:
            states = {_finished(run) for run in runs}
        except TimeoutError:
            for command in (("list", "--limit", "10"), ("kept", "--limit", "10")):
                print(self._airflow.airflow("events", *command), flush=True)
            raise
        got = collections.defaultdict(list)
        for part, run in enumerate(runs):
            for number in range(EACH):
                event = run.xcom(f"order_{number}")
                if event is not None:
                    got[part * EACH + number].append(event["id"])
                    if event["order"] != part * EACH + number:
                        got[event["order"]].append(event["id"])
        return states, got

    async def _restart(self) -> None:
        """End one server after another, and wait until it answers again."""
        for name in itertools.cycle(self._names):
            await asyncio.sleep(random.uniform(2, 5))
            how = random.choice(("kill", "stop"))
            async with self._all_up:
                await asyncio.shield(asyncio.to_thread(self._end_and_start, name, how))
            self.restarts[how] += 1

    def _end_and_start(self, name: str, how: str) -> None:
        getattr(self._airflow.components[name], how)()
        self._serve(name)
        port = self._ports[self._names.index(name)]
        end = time.monotonic() + 120
        while time.monotonic() < end and not _answers(port):
            time.sleep(0.2)

    def _bring_up(self) -> None:
        for name in self._names:
            if not self._airflow.components[name].alive:
                self._serve(name)

    async def _send_all(self, numbers: list[int]) -> None:
        import httpx

        todo = collections.deque(numbers)
        token = self._airflow._token
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

        async def sender(name: int) -> None:
            async with httpx.AsyncClient(timeout=60, headers=headers) as client:
                while todo:
                    number = todo.popleft()
                    events = [f"{number} of {name}"]
                    if number % HAS_RIVAL == 0:
                        events.append(f"{number} of a rival")
                    await asyncio.gather(*(self._send(client, number, event, token) for event in events))
                    await asyncio.sleep(random.uniform(0, 2 * self._options.pace))

        await asyncio.gather(*(sender(name) for name in range(self._options.senders)))
        print(f"{len(numbers)} sent; {dict(self.seen)}; restarts: {dict(self.restarts)}", flush=True)

    async def _send(self, client, number: int, event: str, token: str) -> None:
        """Send an event until there is an answer, and look once more whether it is the same."""
        import httpx

        url = f"{self._airflow.url}/events/keys/{_key(number)}"
        body = {"order": number, "id": event}
        told = self.told[number].setdefault(event, [])
        if number % HANGS_UP == 1:
            await self._hang_up(number, body, token)
        looks = 2 if number % HANGS_UP == 2 else 1
        while len(told) < looks:
            try:
                answer = await client.post(url, json=body, headers={"Idempotency-Key": event})
            except httpx.HTTPError:
                self.seen["no answer"] += 1
                await asyncio.sleep(0.2)
                continue
            self.seen[str(answer.status_code)] += 1
            if answer.status_code in (200, 202):
                told.append(answer.status_code)
            elif answer.status_code in _AGAIN:
                await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))
            else:
                self._faults.append(f"{event}: {answer.status_code} {answer.text[:300]}")
                return

    async def _hang_up(self, number: int, body: dict[str, object], token: str) -> None:
        """Send the request, and be gone before the answer."""
        text = json.dumps(body).encode()
        head = (
            f"POST /events/keys/{_key(number)} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nIdempotency-Key: {body['id']}\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self._airflow.port)
            writer.write(head.encode() + text)
            await writer.drain()
            await asyncio.sleep(random.choice((0, 0.005, 0.05)))
            writer.close()
        self.seen["hung up"] += 1

    def _judge(self, states: set[str], got: dict[int, list[str]], seconds: float) -> int:
        wanted = range(self._options.events)
        lost = [number for number in wanted if number not in got]
        twice = [number for number, events in got.items() if len(events) > 1]
        strange = [number for number, events in got.items() if events[0] not in self.told[number]]
        # Who was told that a wait has the event, and another event is there.
        lies = [
            event
            for number, events in self.told.items()
            for event, told in events.items()
            if 200 in told and event not in got.get(number, ())
        ]
        restarts = self.restarts
        changed = [event for events in self.told.values() for event, told in events.items() if len({*told}) > 1]
        rows = {
            "keys, each with a wait": len(wanted),
            "events sent": sum(len(events) for events in self.told.values()),
            "delivered / lost / delivered twice": f"{len(got)} / {len(lost)} / {len(twice)}",
            "events that nobody sent": len(strange),
            "senders who were told that a wait has their event, and it has another": len(lies),
            "senders who were told something else when they asked again": len(changed),
            "answers": ", ".join(f"{number} x {status}" for status, number in sorted(self.seen.items())),
            "answers that are no sender's business (500 and others)": len(self._faults),
            "API servers killed / stopped, and started again": f"{restarts['kill']} / {restarts['stop']}",
            "states of the runs": ", ".join(sorted(states)),
            "seconds in all": round(seconds),
        }
        print("\n| | |\n|---|---|")
        for name, value in rows.items():
            print(f"| {name} | {value} |")
        for fault in self._faults[:5]:
            print(fault)
        print(f"lost {lost[:5]}, twice {twice[:5]}, strange {strange[:5]}, lies {lies[:5]}, changed {changed[:5]}")
        is_good = states == {"success"} and not (lost or twice or strange or lies or changed or self._faults)
        print("each event was delivered once, and nobody was told a lie" if is_good else "NOT GOOD")
        return 0 if is_good else 1


def _finished(run) -> str:
    """Return in which state a run has ended, asked again where a server ends that is asked."""
    while True:
        with contextlib.suppress(ConnectionError):
            return run.finished(timeout=600)
        time.sleep(1)


def _key(number: int) -> str:
    return f"order-{number // EACH}-{number % EACH}"


def _answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/version", timeout=5):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main()
