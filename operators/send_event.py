"""``send_event``, and the operator behind it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.sdk.bases.operator import BaseOperator
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow_events.listeners.http import check_key
from airflow_events.listeners.support.values import seconds
from airflow_events.operators.event_hook import EventHook
from airflow_events.operators.wait_for_event import OfTask

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context


class SendEventOperator(BaseOperator):
    """
    Send an event to waits of ``HttpListener(key=...)``, in any DAG, and return what became of it.

    It sends once, however often the task is retried or cleared: so retries, which ``retries`` and
    ``retry_delay`` have defaults for, do no harm.

    :param key: of the waits.
    :param event: any JSON: literals, templates, outputs of other tasks.
    :param to: as `EventHook.send`; ``ttl`` likewise.
    """

    template_fields: Sequence[str] = ("key", "event")
    template_fields_renderers: ClassVar[dict[str, str]] = {"event": "json"}
    ui_color = "#d9ead3"
    ui_fgcolor = "#1f3d1f"

    def __init__(
        self,
        *,
        key: str | XComArg,
        event: Any,
        to: Literal["one", "all"] = "one",
        ttl: timedelta | float | None = None,
        retries: int = 3,
        retry_delay: timedelta | float = timedelta(seconds=10),
        **kwargs: Any,
    ) -> None:
        super().__init__(retries=retries, retry_delay=retry_delay, **kwargs)
        if to not in ("one", "all"):
            raise ValueError(f"an event goes to 'one' or to 'all', not to {to!r}")
        if isinstance(key, str) and "{" not in key:  # and no template
            check_key(key)
        self.key = key
        self.event = event
        self.to = to
        self.ttl = None if ttl is None else seconds(ttl, "ttl")

    def execute(self, context: Context) -> dict[str, Any]:
        return EventHook().send(self.key, self.event, to=self.to, ttl=self.ttl)  # type: ignore[arg-type]  # rendered


class _SendEvent(OfTask):
    """
    ``send_event(key, event)``: a task that sends an event, and its output: what became of it.

    What is for the task goes to `override`, as in TaskFlow::

        send_event.override(task_id="tell")("order-{{ params.order }}", {"paid": True}, to="all", ttl=3600)
    """

    _mapped = (
        "a mapped one is SendEventOperator.partial(task_id=..., key=...).expand(event=...); "
        "it is in airflow_events.operators.send_event"
    )

    def __call__(
        self,
        key: str | XComArg,
        event: Any,
        *,
        to: Literal["one", "all"] = "one",
        ttl: timedelta | float | None = None,
        **of_task: Any,
    ) -> XComArg:
        for name in of_task:
            raise TypeError(
                f"{name} is no argument of an event. If it is one of the task: "
                f"send_event.override({name}=...)(key, event)"
            )
        return self._output(SendEventOperator, "send_event", key=key, event=event, to=to, ttl=ttl)


send_event = _SendEvent()

__all__ = ["SendEventOperator", "send_event"]
