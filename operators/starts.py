"""``start_on``: what a DAG's ``schedule`` takes so that each event starts a run of it."""

from __future__ import annotations

import json
import math
from datetime import timedelta, timezone
from typing import Any, NoReturn

from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.definitions.asset import Asset, AssetWatcher
from airflow_events.errors import EventNotSerializable
from airflow_events.inbox.entries import START_GROUP
from airflow_events.listeners.base import EventListener, check_arguments, check_listener, commits, describe
from airflow_events.listeners.support import serde
from airflow_events.operators.placement import resolves_at_run_time
from airflow_events.triggers import reference
from airflow_events.triggers.starts import StartTrigger, digest

_LARGEST_BATCH = 1000


class EventStart(Asset):
    """An asset whose watcher starts a run for each event. Nobody else is to update it."""

    def __and__(self, other: Any) -> NoReturn:
        raise TypeError(
            "start_on starts a run for each event, so it cannot wait for another asset; `|` lets either start it"
        )

    __rand__ = __and__


class _StartOn:
    """
    ``start_on(listener, *args, **kwargs)``: a schedule that starts one run for each event, exactly once.

    ``args`` and ``kwargs`` go to the listener's ``poll_for_event``; they are literals, and no templates. The run
    has the event as ``conf["event"]``, in JSON shapes. No more is taken than the DAG has room for::

        @dag(schedule=start_on(KafkaListener, topic="orders", group="etl"), max_active_runs=8)
        def order():
            ship("{{ dag_run.conf.event.value }}")
    """

    def __init__(
        self,
        *,
        up_to: int | None = None,
        batch: int | None = None,
        within: timedelta | float | None = None,
        name: str | None = None,
    ) -> None:
        self._what: dict[str, Any] = {} if up_to is None else {"up_to": _number("up_to", up_to)}
        if batch is not None or within is not None:
            if batch is None or within is None:
                raise ValueError(
                    "batch is how many events a run has, within how long it waits for them: give both"
                )
            self._what.update(
                makes="batch", batch=_number("batch", batch, _LARGEST_BATCH), within=_seconds(within)
            )
        self._name = name

    def override(
        self,
        *,
        up_to: int | None = None,
        batch: int | None = None,
        within: timedelta | float | None = None,
        name: str | None = None,
    ) -> _StartOn:
        """
        Return the same with other settings.

        :param up_to: how many runs of the DAG there may be, queued or running, until events are left at their
            source; None is the DAG's ``max_active_runs``.
        :param batch: start a run for a list of events, of at most so many, which it has as ``conf["events"]``.
        :param within: a timedelta, or seconds, after the first of them: then the run starts with what has come.
        :param name: of the asset; None is the listener and its arguments.
        """
        return _StartOn(up_to=up_to, batch=batch, within=within, name=name)

    def __call__(self, listener: type[EventListener], /, *args: Any, **kwargs: Any) -> EventStart:
        """
        Return what a DAG's ``schedule`` takes.

        :raises TypeError: the listener cannot start runs exactly once, or does not take these arguments; the
            message says why.
        :raises ListenerUnavailable: a triggerer cannot have the listener.
        """
        trigger = _trigger(listener, args, kwargs, **self._what)
        name = self._name or _name(listener, args, kwargs, trigger)
        return EventStart(name, group=START_GROUP, watchers=[AssetWatcher("start_on", trigger)])


def _number(name: str, value: Any, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (most is not None and value > most):
        raise ValueError(
            f"{name} is a number of at least 1{f' and at most {most}' if most else ''}, not {value!r}"
        )
    return value


def _seconds(value: timedelta | float) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if not 0 < seconds < math.inf:
        raise ValueError(f"within is a time of more than 0 seconds, not {value!r}")
    return seconds


start_on = _StartOn()


def event_trigger(listener: type[EventListener], /, *args: Any, **kwargs: Any) -> StartTrigger:
    """
    Return a trigger for an asset's watcher, which makes one asset event of each event, exactly once.

    ``args`` and ``kwargs`` are as of `start_on`. The asset event has the event as ``extra["payload"]``, in JSON
    shapes::

        orders = Asset("orders", watchers=[AssetWatcher("kafka", event_trigger(KafkaListener, topic="orders"))])

    :raises TypeError: as of `start_on`; `ListenerUnavailable` likewise.
    """
    return _trigger(listener, args, kwargs, makes="asset_event")


def _trigger(listener: type[EventListener], args: Any, kwargs: Any, **what: Any) -> StartTrigger:
    _check(listener, args, kwargs)
    return StartTrigger.of(
        listener, serde.localized(args, timezone.utc), serde.localized(kwargs, timezone.utc), **what
    )


def _check(listener: type[EventListener], args: Any, kwargs: Any) -> None:
    check_listener(listener)
    name = listener.__qualname__
    if not commits(listener):
        raise TypeError(f"{name} has nothing to acknowledge (event_checkpointed): it would start runs without end")
    if listener.event_id is EventListener.event_id:
        raise TypeError(
            f"{name} does not say what tells an event from every other (event_id), so a redelivery would start "
            "another run"
        )
    if not reference.is_importable(listener) and (why := reference.unsteady(listener)):
        raise TypeError(f"a triggerer cannot import {name}, and {why}; move it to an installed package")
    if resolves_at_run_time([list(args), kwargs]):
        raise TypeError("start_on takes literals: there is no task yet whose output it could use")
    for label, value in (("args", list(args)), ("kwargs", kwargs)):
        try:
            serde.check(value, label)
        except EventNotSerializable as error:
            raise TypeError(f"start_on: {error}") from error
    if "{{" in json.dumps(serde.as_json([list(args), kwargs])):
        raise TypeError("start_on takes literals: there is no run yet for which a template could be rendered")
    check_arguments(listener, args, kwargs)


def _name(listener: type[EventListener], args: Any, kwargs: Any, trigger: StartTrigger) -> str:
    """Return a name that tells what the asset is, and, where that is shortened or masked, what no other has."""
    shown = describe(listener.__name__, redact(list(args)), redact(kwargs))
    arguments = [repr(one) for one in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    if shown != f"{listener.__name__}({', '.join(arguments)})" or len(shown) > 500 or not shown.isascii():
        shown = f"{shown[:500].encode('ascii', 'backslashreplace').decode()} #{digest(trigger)[:8]}"
    return shown
