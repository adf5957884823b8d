"""
The formats that an upgrade finds in databases and in other processes: they change by a decision, not by chance.

Trigger rows outlive an upgrade; API servers and triggerers of two versions talk to one another during one; tables
have migrations (``inbox/test_migrations.py``).
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from airflow_events import task_proof
from airflow_events.api import keys, senders, task_events, variables
from airflow_events.inbox import entries, starts
from airflow_events.inbox.entries import Answer, End, Phase, Place, Status, Stored
from airflow_events.listeners.base import Wait
from airflow_events.listeners.directory import DirectoryListener
from airflow_events.listeners.http import address_of
from airflow_events.listeners.rabbitmq import RabbitMQListener
from airflow_events.listeners.support import positions
from airflow_events.triggers.event import EventTrigger, identity, recording
from airflow_events.triggers.events import EventsTrigger
from airflow_events.triggers.starts import StartTrigger

TRIGGER = "airflow_events.triggers.event.EventTrigger"


def test_the_arguments_of_a_trigger():
    path, arguments = EventTrigger(listener="module:Listener").serialize()
    assert path == TRIGGER
    assert arguments == {
        "listener": "module:Listener",
        "listener_args": [],
        "listener_kwargs": {},
        "finish_on_worker": False,
        "timeout": None,
        "soft_fail": False,
        "default": [],
        "push": True,
        "multiple_outputs": False,
        "outlets": [],
        "replay": True,
        "wait": None,
        "mapped_over": False,
        "shown": "",
    }


def test_the_arguments_of_a_trigger_of_many_events():
    path, arguments = EventsTrigger(listener="module:Listener", calls="{}", count=5).serialize()
    assert path == "airflow_events.triggers.events.EventsTrigger"
    _, of_one = EventTrigger(listener="module:Listener").serialize()
    del of_one["listener_args"], of_one["listener_kwargs"]
    assert arguments == {**of_one, "calls": "{}", "count": 5, "first": None}
    EventsTrigger(
        listener="module:Listener", calls="{}", count=5, hand_over=True, have=[1]
    )  # of the first edition


def test_the_arguments_of_a_trigger_that_starts_runs():
    path, arguments = StartTrigger.of(DirectoryListener, ("drops",), {"settle": 1.5}, up_to=4).serialize()
    assert path == "airflow_events.triggers.starts.StartTrigger"
    assert arguments == {
        "listener": "airflow_events.listeners.directory:DirectoryListener",
        "arguments": '[["drops"], {"settle": 1.5}]',
        "up_to": 4,
        "makes": "run",
        "batch": 1,
        "within": 0.0,
    }
    rules = {"match": '{"value.kind": "paid"}', "key": "value.customer", "logical_date": "timestamp"}
    assert StartTrigger(listener="module:Listener", **rules).serialize()[1].items() > rules.items()


def test_the_id_of_a_run_that_an_event_starts():
    told = entries.Told("1", "aa", "bb")
    one, batch = entries.StartRun(record_id="r"), entries.StartRun(record_id="r", makes="batch")
    assert starts.run_id_of(one, [told]) == "event__5531a1e5cdc46e39cbdc9dede0bb3027"
    assert starts.run_id_of(batch, [told, told]) == "event__cd4ad71be15d6e721295cab89c49c264"
    assert starts.run_id_of(one, [entries.Told("1")]) == "event__d9ab968ee617c0bdcd3ed7fe474a69a6"
    keyed = entries.StartRun(record_id="r", key="7")
    assert starts.run_id_of(keyed, [told]) == "event__7902699be42c8a8e_5531a1e5cdc46e39cbdc9dede0bb3027"


def test_a_trigger_row_of_the_first_edition_is_read():
    """It had a deadline where a worker had started it."""
    of_old = {
        "listener": "module:Listener",
        "listener_args": ["a"],
        "listener_kwargs": {},
        "finish_on_worker": True,
        "timeout": None,
        "deadline": datetime.now(timezone.utc) + timedelta(hours=1),
        "soft_fail": False,
        "default": [],
        "push": True,
        "wait": {"dag_id": "d", "run_id": "r", "task_id": "t", "map_index": -1, "after": ""},
        "mapped_over": False,
    }
    trigger = EventTrigger(**of_old)
    assert 3590 < trigger.timeout <= 3600


def test_what_is_asked_of_the_inbox_and_answered():
    asked = {name: [one.name for one in fields(kind)] for name, kind in entries.ENTRIES.items()}
    assert asked == {
        "begin": [
            "ti", "place", "listener", "call", "arguments", "rendered", "timeout", "grace", "replay", "address",
            "holder", "wanted", "hosted", "sought",
        ],
        "park": ["ti", "place", "generation", "kwargs", "at", "then"],
        "join": ["ti", "place", "generation", "kwargs", "host"],
        "hosted": ["ti", "place", "host", "trigger", "after", "brief", "log_of", "trouble", "waits"],
        "record": [
            "ti", "place", "generation", "record_id", "event", "identity", "content", "committed", "after",
            "arguments", "end",
        ],
        "finish": ["ti", "place", "generation", "record_id", "end", "acknowledged"],
        "set_aside": ["ti", "place", "generation", "identity", "reason"],
        "settle": ["ti", "place", "identity", "content"],
        "lose": ["ti", "place", "generation", "record_id"],
        "places": ["ti", "place", "generation", "start", "limit"],
        "look": ["ti", "place", "generation"],
        "positions": ["ti", "place", "source", "settled", "begins"],
        "start_room": ["ti", "place", "trigger", "up_to", "makes", "lag", "trouble"],
        "start_run": [
            "ti", "place", "trigger", "up_to", "makes", "record_id", "events", "key", "logical_date",
        ],
    }  # fmt: skip
    assert [one.name for one in fields(End)] == [
        "state", "xcoms", "dag_result", "mapped_length", "outlets", "payload"
    ]  # fmt: skip
    assert [one.name for one in fields(Answer)] == [
        "status", "message", "generation", "deadline", "left", "run_start", "run_created", "lost", "stored",
        "superseded", "by", "places", "next", "settled", "owner", "room", "dags", "hosted", "after",
    ]  # fmt: skip
    assert [one.name for one in fields(entries.Told)] == ["event", "identity", "content"]
    assert [one.name for one in fields(Stored)] == ["record_id", "phase", "event", "after"]
    assert [one.name for one in fields(Place)] == [
        "record_id", "phase", "event", "after", "place", "lost", "arguments"
    ]  # fmt: skip
    assert {status.value for status in Status} == {
        "done", "has", "taken", "rejected", "changed", "outlived", "invalid", "full", "busy"
    }  # fmt: skip
    assert {phase.value for phase in Phase} == {"recorded", "committed", "rejected"}


def test_by_what_waits_kept_events_and_receipts_are_found():
    assert address_of("größe") == "d353a2671b67afff0941ae456e5c76e9394bd6579774ae7542a6185fb9843384"
    of_some = keys._identity("ada", ["a", "b"], "key", "k").hex()
    of_all = keys._identity("ada", None, "key", "k").hex()
    assert of_some == "49865db1f61d34e774537cb5696f7d8e973bad24eeb132fca9603ce37539c775"
    assert of_all == "c21ffa9e702e58aeafe31c31d2d800e673bdbd2e5c0c7e2e19c162a005bb1c8b"
    of_first_edition = variables.identity_of("key", "k").hex()
    assert of_first_edition == "91e27e23bbce4821ea0ec72856451b7199886216b177bea9599eaf0a1a90f6f7"


def test_the_ids_of_dropped_files():
    from airflow_events.listeners.directory.files import Attributes, coordinates

    assert Attributes(31, 42, 3).identity == "1f-2a-3"
    assert Attributes(31, 42, 3, born=4).identity == "1f-2a-3-4"
    assert coordinates("/drops/größe", 'a "b".csv', "1f-2a-3") == '["/drops/größe", "a \\"b\\".csv", "1f-2a-3"]'


def test_the_ids_of_entries_in_redis():
    from airflow_events.listeners.redis.client import coordinates

    found = coordinates("redis.shop:6379/0", "größe", "airflow", "1700000000000-0")
    assert found == '["redis.shop:6379/0", "größe", "airflow", "1700000000000-0"]'


def test_the_ids_of_rows_in_postgresql():
    from airflow_events.listeners.postgres.client import coordinates

    found = coordinates("7583254132412345678", "shop", "public.größe", 16401, 7)
    assert found == '["7583254132412345678", "shop", "public.größe", 16401, "7"]'


def test_the_digest_by_which_the_inbox_knows_an_event():
    found = identity("airflow_events.listeners.redis:RedisListener", "1")
    assert found == "d7248ae9bc64970b671202916cf6aeabb0ccfdc36ed5b0fe25978c42a8e0dd40"


def test_the_ids_of_messages_of_sqs():
    from airflow_events.listeners.sqs import SqsListener
    from airflow_events.listeners.sqs.client import coordinates

    found = coordinates(
        "arn:aws:sqs:eu-central-1:123456789012:orders.fifo", "5fea7756-0ea4-451a-a703-a558b933e274"
    )
    assert found == (
        '["arn:aws:sqs:eu-central-1:123456789012:orders.fifo", "5fea7756-0ea4-451a-a703-a558b933e274"]'
    )
    of_first_edition = {"queue": "orders", "message_id": "5fea7756-0ea4", "receipt_handle": "AQEB"}
    assert SqsListener().event_id(of_first_edition) == '["", "5fea7756-0ea4"]'


def test_by_what_a_nats_message_is_known():
    pytest.importorskip("nats")
    from airflow_events.listeners.nats import NatsListener

    event = {"stream": "größe", "created": "2026-11-28T22:58:12.155020528Z", "durable": "airflow", "sequence": 17}
    id = '["größe", "2026-11-28T22:58:12.155020528Z", "airflow", 17]'
    assert NatsListener().event_id(event) == id
    digest = identity("airflow_events.listeners.nats:NatsListener", id)
    assert digest == "b6b5ca508c23c04890724be5adbf5827b4d5fb207d7a48f9d81a0fbcf6f4071e"


def test_the_id_of_a_message_of_rabbitmq():
    event = {"server": "mq:5672", "virtual_host": "/", "queue": "größe", "message_id": "4711"}
    assert RabbitMQListener().event_id(event) == '["mq:5672", "/", "größe", "4711"]'
    without = {**event, "message_id": None, "delivery": "8c2f"}
    assert RabbitMQListener().event_id(without) == '["mq:5672", "/", "größe", null, "8c2f"]'


def test_the_coordinates_of_kafka():
    from airflow_events.listeners.kafka import KafkaListener
    from airflow_events.listeners.kafka.group import partition_of, source_of

    event = {
        "topic": "größe",
        "partition": 3,
        "offset": 4711,
        "group": "etl",
        "cluster": "mLiCyrmFR8SXZ0q3mIlPrg",
        "topic_id": "jKTRaM_TSNqocJeQI2aYOQ",
        "value": 1,
    }
    id = KafkaListener().event_id(event)
    assert id == '["mLiCyrmFR8SXZ0q3mIlPrg", "jKTRaM_TSNqocJeQI2aYOQ", "größe", 3, 4711, "etl"]'
    assert source_of("mLiCyrmFR8SXZ0q3mIlPrg", "größe", "etl") == '["mLiCyrmFR8SXZ0q3mIlPrg", "größe", "etl"]'
    assert partition_of("jKTRaM_TSNqocJeQI2aYOQ", 3) == "jKTRaM_TSNqocJeQI2aYOQ/3"
    # Two waits that read it in two formats have the same event.
    wait = Wait("d", "r", "t")
    contents = {recording(KafkaListener, "l", wait, {**event, "value": value})["content"] for value in (1, "1")}
    assert contents == {"4f83773081d241d2fbfaa86e1fb6ea5a1e90d055932a1701edfc598eb2cc605d"}


def test_by_what_the_inbox_finds_what_is_settled():
    found = positions.digest('["cluster", "größe", "etl"]').hex()
    assert found == "a2dcee5c51deb4a527f554ff93db339d2cc34f8ce3966648cb97086870f8c173"


def test_by_what_the_events_of_tasks_are_found():
    assert task_proof.STATE == "airflow_events.sender"
    assert task_proof.digest("proof") == "c1cda26362828b69266512052b97cb3729e3b052e4ade47c0a1e3383defe73c7"
    sender = task_events.Sender("dag", "run", "task", -1, "2026-11-23T12:00:00+00:00")
    sent = task_events.Sent(key="key", event=1, to="one", ttl=None, name="1")
    assert (
        task_events._identity(sender, sent).hex()
        == "8009145cc16a586f8809880fac5125db232c454f855703c1ed0aca1fd7c1a8ba"
    )


def test_by_what_the_senders_of_kept_events_are_found(monkeypatch):
    monkeypatch.setattr(senders, "get_fernet", lambda: SimpleNamespace(encrypt=lambda told: told))
    told = [
        senders.User({"sub": "1"}).encrypted(),
        senders.Webhook("conn", "key").encrypted(),
        senders.Task("dag").encrypted(),
    ]
    assert told == [
        '["user", {"claims": {"sub": "1"}}]',
        '["webhook", {"conn_id": "conn", "key": "key"}]',
        '["task", {"dag_id": "dag"}]',
    ]
