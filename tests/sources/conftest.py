from __future__ import annotations

import asyncio
import json
import re

import pytest
from airflow_events.listeners.base import Wait, working_for
from of_kafka import Kafka, KafkaCluster, KafkaOneCoordinator
from of_nats import Nats
from of_postgres import PostgresJsonb, PostgresTable
from of_rabbitmq import Quorum, RabbitMQ
from of_redis import Redis6, Valkey
from of_sqs import Sqs, SqsFifo

BROKERS = (Valkey, Redis6, PostgresTable, PostgresJsonb, Nats, RabbitMQ, Quorum, Sqs, SqsFifo, Kafka)
# Of what is tested of all sources; what is peculiar to one of them is tested of it each time.
VARIANTS = (Redis6, PostgresJsonb, RabbitMQ, SqsFifo)
NAMES = "|".join(re.escape(broker.name) for broker in (*BROKERS, KafkaCluster, KafkaOneCoordinator))


def together(nodeid):
    """
    Name what a test stays together with: the tests of its broker, which then starts once.

    Kafka has two, since its own tests take as long as those of all that it shares with the others.
    """
    file, _, test = nodeid.partition("::")
    if (found := re.search(rf"[-\[]({NAMES})[-\]]", test)) is None:
        return nodeid
    return "kafka alone" if found[1] == "kafka" and "/test_kafka" in file else found[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Share the tests among several processes by their brokers; pytest 9.2 passes over xdist's own groups."""
    from xdist.scheduler import LoadScopeScheduling

    class ByBroker(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return together(nodeid)

    return ByBroker(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of a test that failed how the servers of its broker are, and what they wrote last."""
    report = yield
    broker = getattr(item, "funcargs", {}).get("broker")
    if report.failed and report.when == "call" and broker is not None:
        for server in broker.servers:
            about = f"the server at {server.port}, {server.process and server.process.poll()}"
            for log in sorted(server.folder.glob("*.log")):
                lines = log.read_text(errors="replace").splitlines()
                report.sections.append((f"{about}: {log.name}", "\n".join(lines[-20:])))
    return report


def _of_all(broker):
    marks = pytest.mark.release if broker in VARIANTS else ()
    return pytest.param(broker, marks=marks, id=broker.name)


@pytest.fixture(scope="session", params=map(_of_all, BROKERS))
def server(request):
    broker = request.param.make()
    if broker is None:
        pytest.skip(f"{request.param.name}: {request.param.missing}")
    yield broker
    broker.stop()


@pytest.fixture
def broker(server, monkeypatch):
    """The source, with a queue of this test's own."""
    server.fresh()
    if server.server.process.poll() is not None:
        server.server.start()
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE", json.dumps(server.connection()))
    monkeypatch.setenv("AIRFLOW__EVENTS__UNREACHABLE_TIMEOUT", "300")
    return server


def wait(number=0):
    return Wait("dag", f"run{number}", "task")


class Waits:
    """The waits of one triggerer, on one broker."""

    def __init__(self, broker):
        self.broker = broker
        self.tasks = []

    def poll(self, number=0, **changes):
        """Begin to poll for the wait of that number."""
        args, kwargs = self.broker.arguments(**changes)
        return self._start(self.broker.listener, number, args, kwargs)

    def watch(self, number=0, **changes):
        args, kwargs = self.broker.watch_arguments(**changes)
        return self._start(self.broker.watcher, number, args, kwargs)

    def _start(self, listener, number, args, kwargs):
        with working_for(wait(number)):
            task = asyncio.create_task(listener().poll_for_event(*args, **kwargs))
        self.tasks.append(task)
        return task

    async def commit(self, event, number=0):
        with working_for(wait(number)):
            await self.broker.listener().event_checkpointed(event)

    async def release(self, event, number=0, **changes):
        args, kwargs = self.broker.arguments(**changes)
        with working_for(wait(number)):
            await self.broker.listener().event_released(event, *args, **kwargs)

    async def end(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def waits(broker):
    waits = Waits(broker)
    yield waits
    await waits.end()
