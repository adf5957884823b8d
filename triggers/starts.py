"""The trigger of an asset's watcher that starts runs, or makes asset events, of the events of a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent
from airflow_events.listeners.base import EventListener
from airflow_events.listeners.support import serde
from airflow_events.triggers import reference
from airflow_events.triggers.batching import Batches
from airflow_events.triggers.event import leave
from airflow_events.triggers.start_rules import Rules
from airflow_events.triggers.starting import Starts, What


class StartTrigger(BaseEventTrigger):
    """
    Start a run for each event.

    The parameters are frozen, since they stand in serialized DAGs and in trigger rows that an upgrade finds. All
    are plain text and numbers: Airflow compares them at each parse, and another form of the same would be another
    trigger.

    :param listener: as `airflow_events.triggers.reference` names it; one that travels by value as JSON text.
    :param arguments: of ``poll_for_event``, a list and a dict, as `airflow_events.listeners.support.serde` writes
        them.
    :param up_to: how many runs of a DAG there may be at once; None is its ``max_active_runs``.
    :param makes: what is made of events, as of `StartRoom`.
    :param batch: how many events a run has at most, of a ``batch``.
    :param within: seconds after the first of them until it has those that have come.
    :param match: as of `Rules`; ``key`` and ``logical_date`` likewise.
    :param name: that the author gave the asset. It makes triggers different that poll for the same.
    """

    def __init__(
        self,
        *,
        listener: str,
        arguments: str = "[[], {}]",
        up_to: int | None = None,
        makes: str = "run",
        batch: int = 1,
        within: float = 0.0,
        match: str | None = None,
        key: str | None = None,
        logical_date: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.listener = listener
        self.arguments = arguments
        self.up_to = up_to
        self.makes = makes
        self.batch = batch
        self.within = within
        self.rules = {
            name: rule
            for name, rule in (("match", match), ("key", key), ("logical_date", logical_date))
            if rule is not None
        }
        self.name = name

    @classmethod
    def of(cls, listener: type[EventListener], args: Any, kwargs: Any, **what: Any) -> StartTrigger:
        """
        Return the trigger of a listener and checked arguments.

        :raises ListenerUnavailable: it is to travel by value, and cannot.
        """
        refer = reference.refer(listener)
        return cls(
            listener=refer if isinstance(refer, str) else json.dumps(refer, sort_keys=True),
            arguments=serde.encode([list(args), dict(kwargs)]),
            **what,
        )

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{__name__}.{type(self).__name__}",
            {
                "listener": self.listener,
                "arguments": self.arguments,
                "up_to": self.up_to,
                "makes": self.makes,
                "batch": self.batch,
                "within": self.within,
                **self.rules,  # those that are given, so that an upgrade leaves other triggers as they are
                **({} if self.name is None else {"name": self.name}),
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        assert self.trigger_id is not None, "a trigger is started by a triggerer"
        refer: Any = json.loads(self.listener) if self.listener.startswith("{") else self.listener
        args, kwargs = serde.decode(self.arguments)
        what = What(self.trigger_id, refer, args, kwargs, self.up_to, self.makes, Rules(**self.rules))
        loop = Batches(what, self.batch, self.within) if self.makes == "batch" else Starts(what)
        await loop.run()
        leave()
        yield TriggerEvent(None)  # it does not come to this: Airflow would make an asset event of it


def digest(trigger: StartTrigger) -> str:
    """Return what tells a trigger from every other, in hex."""
    return hashlib.sha256(json.dumps(trigger.serialize(), sort_keys=True).encode()).hexdigest()
