"""What of arguments is shown: nothing secret, wherever it stands."""

from __future__ import annotations

import pytest
from airflow.models.trigger import Trigger
from airflow.sdk._shared.secrets_masker import redact
from airflow_events.listeners.base import EventListener
from airflow_events.listeners.support.masking import masked, masked_call
from airflow_events.triggers.calls import Calls
from airflow_events.triggers.event import EventTrigger
from airflow_events.waits import arguments


class Shop(EventListener):
    async def poll_for_event(self, url, password, *more, token=None, **options):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("amqp://ada:hunter2@rabbit:5672/shop", "amqp://ada:***@rabbit:5672/shop"),
        ("redis://:hunter2@redis/0", "redis://:***@redis/0"),
        ("https://ada:p@ss:w@host/a?b=c", "https://ada:***@host/a?b=c"),
        (
            "see postgresql+psycopg://ada:x@db/shop and http://host/",
            "see postgresql+psycopg://ada:***@db/shop and http://host/",
        ),
        ("amqp://ada:p/ss?w#rd@rabbit:5672/shop", "amqp://ada:***@rabbit:5672/shop"),
        ("https://ghp_0123456789abcdefgh@host/a", "https://***@host/a"),
        ("nats://ada@host", "nats://ada@host"),
        ("https://host:8443/a@b?to=ada@example.com", "https://host:8443/a@b?to=ada@example.com"),
        ("https://host/hook?token=t0p&n=1&api_key=k", "https://host/hook?token=***&n=1&api_key=***"),
        ("host=db user=ada password=hunter2 dbname=shop", "host=db user=ada password=*** dbname=shop"),
        ("password = 'hunter 2' host=db", "password = *** host=db"),
        ("a=1 and topic=orders", "a=1 and topic=orders"),
        ({"servers": ["nats://u:p@a", ("nats://u:p@b",)]}, {"servers": ["nats://u:***@a", ("nats://u:***@b",)]}),
        (7, 7),
        (None, None),
    ],
)
def test_a_password_within_a_text(value, shown):
    assert masked(value, redact) == shown


def test_positional_arguments_have_the_names_of_the_parameters():
    args, kwargs = masked_call(
        Shop, ["amqp://a:b@c", "hunter2", "more", "m"], {"token": "t", "other": "o"}, redact
    )
    assert args == ["amqp://a:***@c", "***", "more", "m"]
    assert kwargs == {"token": "***", "other": "o"}
    assert masked_call(None, ["amqp://a:b@c", "x"], {}, redact) == (["amqp://a:***@c", "x"], {})


def test_a_trigger_shows_them_so():
    trigger = EventTrigger(
        listener=f"{__name__}:Shop", listener_args=["amqp://a:b@c", "hunter2"], listener_kwargs={}, wait={}
    )
    trigger._masked = lambda *call: masked_call(Shop, *call, redact)
    assert trigger._call() == "Shop('amqp://a:***@c', '***')"
    unknown = EventTrigger(listener="no:Such", listener_args=["amqp://a:b@c"], listener_kwargs={}, wait={})
    assert unknown._call() == "Such('amqp://a:***@c')"


@pytest.mark.parametrize(
    "told",
    [
        {"listener": "x:Shop", "listener_args": ["amqp://a:b@c"], "listener_kwargs": {"url": "redis://:b@c"}},
        {
            "listener": "x:Shop",
            "count": 1,
            "calls": Calls([["amqp://a:b@c"]], {"url": "redis://:b@c"}).encode(),
        },
    ],
)
def test_the_page_shows_them_so_before_the_wait_begins(told):
    shown = arguments.read(Trigger.encrypt_kwargs(told))
    assert "Shop('amqp://a:***@c', url='redis://:***@c')" in shown.call
    assert "b@c" not in str(shown)
