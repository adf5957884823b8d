"""``start_on``: what a DAG's ``schedule`` takes so that each event starts a run of it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from datetime import timedelta, timezone
from typing import Any, NoReturn

from airflow.sdk._shared.secrets_masker import redact
from airflow.sdk.definitions.asset import Asset, AssetWatcher
from airflow_events.errors import EventNotSerializable
from airflow_events.inbox.entries import START_GROUP
from airflow_events.listeners.base import (
    EventListener,
    check_arguments,
    check_listener,
    commits,
    describe,
    is_template,
)
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.masking import masked_call
from airflow_events.operators import templates
from airflow_events.operators.placement import resolves_at_run_time
from airflow_events.triggers import reference
from airflow_events.triggers.start_rules import Rules
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
        match: Mapping[str, Any] | str | None = None,
        key: str | None = None,
        logical_date: str | None = None,
        name: str | None = None,
    ) -> None:
        self._what: dict[str, Any] = {} if up_to is None else {"up_to": _number("up_to", up_to)}
        self._what |= _rules(match, key, logical_date)
        if batch is not None or within is not None:
            if batch is None or within is None:
                raise ValueError(
                    "batch is how many events a run has, within how long it waits for them: give both"
                )
            if key is not None:
                raise ValueError("of a key one event at a time starts a run: give key, or batch and within")
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
        match: Mapping[str, Any] | str | None = None,
        key: str | None = None,
        logical_date: str | None = None,
        name: str | None = None,
    ) -> _StartOn:
        """
        Return the same with other settings.

        :param up_to: how many runs of the DAG there may be, queued or running, until events are left at their
            source; None is the DAG's ``max_active_runs``.
        :param batch: start a run for a list of events, of at most so many, which it has as ``conf["events"]``.
        :param within: a timedelta, or seconds, after the first of them: then the run starts with what has come.
        :param match: which events start runs: a mapping of what fields of the event must be, a dot leading into a
            nested one, or a JMESPath expression (`airflow_events.listeners.support.values.Match`). An event that
            does not match is acknowledged, and starts nothing. None takes each.
        :param key: a JMESPath expression that says what an event's key is, such as ``value.customer``. While a run
            with its key is queued or running, an event waits, unacknowledged at its source. An event for which it
            finds null has no key, and waits for no other. None is for events without keys.
        :param logical_date: a JMESPath expression that says what its run's logical date is, such as ``timestamp``:
            a text in ISO 8601, in UTC unless it says otherwise, or seconds since the epoch. Of several events of
            one moment each has the next microsecond. None is for runs without one.
        :param name: of the asset; None is the listener and its arguments.
        """
        return _StartOn(
            up_to=up_to, batch=batch, within=within, match=match, key=key, logical_date=logical_date, name=name
        )

    def __call__(self, listener: type[EventListener], /, *args: Any, **kwargs: Any) -> EventStart:
        """
        Return what a DAG's ``schedule`` takes.

        :raises TypeError: the listener cannot start runs exactly once, or does not take these arguments; the
            message says why.
        :raises ListenerUnavailable: a triggerer cannot have the listener.
        """
        # Airflow has one trigger for all assets whose triggers are the same: each event would start runs of all.
        named = {"name": self._name} if self._name else {}
        trigger = _trigger(listener, args, kwargs, **self._what, **named)
        name = self._name or _name(listener, args, kwargs, trigger, self._what)
        return EventStart(name, group=START_GROUP, watchers=[AssetWatcher("start_on", trigger)])


def _rules(match: Mapping[str, Any] | str | None, key: str | None, logical_date: str | None) -> dict[str, str]:
    """Return the rules that are given, as a trigger has them, checked."""
    for name, expression in (("key", key), ("logical_date", logical_date)):
        if expression is not None and not isinstance(expression, str):
            raise TypeError(f"{name} is a JMESPath expression or None, not {expression!r}")
    try:
        matches = None if match is None else json.dumps(match, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"match takes what JSON has, not {match!r}") from error
    given = {"match": matches, "key": key, "logical_date": logical_date}
    rules = {name: rule for name, rule in given.items() if rule is not None}
    Rules(**rules)
    return rules


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
    args, kwargs = serde.simple(args), serde.simple(kwargs)
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
    if any(map(is_template, templates.strings([list(args), kwargs]))):
        raise TypeError("start_on takes literals: there is no run yet for which a template could be rendered")
    taken = inspect.signature(listener.poll_for_event).parameters
    for option in kwargs.keys() & inspect.signature(start_on.override).parameters.keys() - taken.keys():
        raise TypeError(f"{option} is an argument of start_on: start_on.override({option}=...)({name}, ...)")
    check_arguments(listener, args, kwargs)
    listener.check_arguments(*args, **kwargs)


def _name(
    listener: type[EventListener], args: Any, kwargs: Any, trigger: StartTrigger, what: Mapping[str, Any]
) -> str:
    """Return a name that tells what the asset is, and, where that is shortened or masked, what no other has."""
    shown = describe(listener.__name__, *masked_call(listener, args, kwargs, redact))
    arguments = [repr(one) for one in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    is_short = shown == f"{listener.__name__}({', '.join(arguments)})"
    # Assets of one name are one asset: what makes another trigger has to make another name.
    shown += "".join(f" {name}={value}" for name, value in what.items() if name != "makes")
    if not listener.__module__.startswith("airflow_events."):  # two files may each have a class of this name
        whose = reference.identify(reference.refer(listener))
        shown += f" #{hashlib.sha256(whose.encode()).hexdigest()[:8]}"
    if not is_short or len(shown) > 500 or not shown.isascii():
        shown = f"{shown[:500].encode('ascii', 'backslashreplace').decode()} #{digest(trigger)[:8]}"
    return shown
