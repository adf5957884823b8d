"""Wait for an event from outside, exactly once, in an Airflow DAG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_events.provider_info import VERSION as __version__

if TYPE_CHECKING:
    from airflow_events.api.callback import callback_url
    from airflow_events.listeners.base import EventListener, Wait, current_wait
    from airflow_events.operators.event_hook import EventHook
    from airflow_events.operators.send_event import send_event
    from airflow_events.operators.starts import event_trigger, start_on
    from airflow_events.operators.wait_for_event import wait_for_event
    from airflow_events.operators.wait_for_events import wait_for_events

__all__ = [
    "__version__",
    "EventHook",
    "EventListener",
    "Wait",
    "callback_url",
    "current_wait",
    "event_trigger",
    "send_event",
    "start_on",
    "wait_for_event",
    "wait_for_events",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that a triggerer which imports a listener does not import operators, and so that the
    # modules below this package can be imported in any order.
    if name == "wait_for_event":
        from airflow_events.operators import wait_for_event as module

        return module.wait_for_event
    if name == "wait_for_events":
        from airflow_events.operators import wait_for_events as many

        return many.wait_for_events
    if name == "send_event":
        from airflow_events.operators import send_event as sending

        return sending.send_event
    if name == "EventHook":
        from airflow_events.operators.event_hook import EventHook

        return EventHook
    if name in ("event_trigger", "start_on"):
        from airflow_events.operators import starts

        return getattr(starts, name)
    if name == "callback_url":
        from airflow_events.api.callback import callback_url

        return callback_url
    if name in ("EventListener", "Wait", "current_wait"):
        from airflow_events.listeners import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
