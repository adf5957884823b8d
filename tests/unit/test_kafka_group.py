"""A Kafka client that does not say how a request has ended, which no broker can be made to do."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from airflow_events.listeners.kafka import client, group
from airflow_events.listeners.kafka.client import BrokerUnavailable, Clients, Source
from airflow_events.listeners.kafka.group import Group


class Silent:
    """Stands for the admin client and for the consumer: its futures never end."""

    def describe_topics(self, topics, **_):
        return {"orders": Future()}

    def describe_consumer_groups(self, groups, **_):
        return {name: Future() for name in groups}

    def alter_consumer_group_offsets(self, wanted, **_):
        return {"etl": Future()}

    def committed(self, places, **_):
        return []


@pytest.fixture
def silent(monkeypatch):
    for module in (client, group):
        monkeypatch.setattr(module, "PATIENCE", -4.9)  # 5 s more are given to the client itself
    one = Group(Clients(Source("c", ("orders",), "etl"), {}), Silent())
    monkeypatch.setattr(one, "_asks", Silent)
    return one


def test_a_request_without_an_end_counts_as_brokers_that_cannot_be_reached(silent):
    with pytest.raises(BrokerUnavailable, match="have not answered in time"):
        silent.look()
    _, why = silent._coordinator([("orders", 0)])
    assert isinstance(why, BrokerUnavailable)


def test_a_commit_without_an_end_is_tried_again(silent):
    assert silent.commit({("orders", 0): (7, "airflow-events")}) is False
    assert not silent.is_overtaken
