"""``wait_for_events``, and the operator behind it: one task that waits for many events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.definitions._internal.mixins import ResolveMixin
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout, AirflowSkipException
from airflow_events.listeners.base import EventListener, check_arguments, check_listener
from airflow_events.listeners.support import serde
from airflow_events.operators.placement import resolves_at_run_time
from airflow_events.operators.wait_for_event import (
    MISSING,
    OfTask,
    WaitForEventOperator,
    refuse_those_of_task,
)
from airflow_events.triggers import outcome
from airflow_events.triggers.calls import Calls, packed
from airflow_events.triggers.event import EventTrigger
from airflow_events.triggers.events import EventsTrigger

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context


class WaitForEventsOperator(WaitForEventOperator):
    """
    Wait for many events, and return them as a list, in the order of the arguments.

    One task instance and one trigger wait for all of them. Each event is recorded and committed for itself, as
    that of `WaitForEventOperator` is, in the name of its place in the list, and stays recorded whatever dies, is
    tried again or is cleared: the wait goes on with what is missing.

    :param listener: the class that knows the source.
    :param arguments: a list with the arguments of each poll, or the output of another task that is one. Of each
        item: a mapping is keyword arguments, a list or tuple positional ones, and anything else the only one.
    :param listener_kwargs: keyword arguments that all polls have in common.
    :param first: deliver as soon as so many have come, as pairs of index and event, in the order of the arguments.
        What else was polled goes back to its source. None waits for all.
    :param timeout: as of `WaitForEventOperator`, for all of them together. What has come by then stays recorded.
    :param soft_fail: likewise.
    :param default: when the time is over, deliver this in the place of each event that has not come.
    :param replay: likewise; if False, a clear waits again for all of them.
    """

    template_fields: Sequence[str] = ("arguments", "listener_kwargs")
    template_fields_renderers: ClassVar[dict[str, str]] = {"arguments": "json", "listener_kwargs": "json"}
    trigger_class: ClassVar[type[EventTrigger]] = EventsTrigger
    arguments_as_text: ClassVar[bool] = True
    _made: tuple[Any, Calls, str] | None = None  # from which arguments, and as text, as soon as that is needed

    def __init__(
        self,
        *,
        listener: type[EventListener],
        arguments: Sequence[Any] | XComArg,
        listener_kwargs: Mapping[str, Any] | XComArg | None = None,
        first: int | None = None,
        timeout: timedelta | float | None = None,
        soft_fail: bool = False,
        default: Any = MISSING,
        replay: bool = True,
        retries: int = 3,
        retry_delay: timedelta | float = timedelta(seconds=10),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            listener=listener,
            listener_kwargs=listener_kwargs,
            timeout=timeout,
            soft_fail=soft_fail,
            default=default,
            replay=replay,
            retries=retries,
            retry_delay=retry_delay,
            **kwargs,
        )
        self.arguments = arguments if isinstance(arguments, ResolveMixin) else _listed(arguments)
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            raise ValueError(f"first is a number of events of at least 1, or None for all, not {first!r}")
        if first is not None and self.has_default:
            raise ValueError("default stands in the place of a missing event, and with first= nothing is missing")
        self.first = first
        self._check_arguments()

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        if "listener" in kwargs:
            _refuse(check_listener(kwargs["listener"]))
        return super().partial(**kwargs)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        match event:
            # A trigger of the first edition left it to a worker to record these. Another one finds them, in the
            # inbox or at their source.
            case {"outcome": "Batch" | "Gathered"}:
                return self._defer(context)
        match outcome.decode(event):
            case outcome.TimedOut() if self.has_default:  # also of the first edition
                return self._defer_for_default(context)
            case outcome.TimedOut(deadline, arrived):
                return self._time_is_up(f"until {deadline.isoformat(timespec='seconds')}", arrived)
        return super().execute_complete(context, event)

    def _airflow_has_ended_it(self, context: Context) -> Any:
        if self.has_default:
            return self._defer_for_default(context)
        return super()._airflow_has_ended_it(context)

    def _defer_for_default(self, context: Context) -> None:
        """Let a trigger deliver what has come, which it can ask for, and the default for what has not."""
        self.log.info("The time is up; a trigger delivers what has come, and the default for what has not")
        self._defer(context)

    def _time_is_up(self, until: str, arrived: int | None = None) -> Any:
        count = "not all" if arrived is None else f"{arrived:,}"
        message = f"{count} of {self._wanted:,} events of {self.listener.__qualname__} came {until}"
        if self.soft_fail:
            raise AirflowSkipException(message)
        raise AirflowSensorTimeout(f"{message}; a clear of the task waits for the others")

    def _read_outputs(self) -> None:
        self.arguments = _listed(self.arguments)
        super()._read_outputs()
        if self._wanted > len(self._calls):
            raise AirflowFailException(f"first={self.first}, and the list has {len(self._calls)} items")

    @property
    def _calls(self) -> Calls:
        if self._made is None or self._made[0] is not self.arguments:
            zone = self._zone
            arguments = serde.localized(_listed(self.arguments), zone)
            assert isinstance(self.listener_kwargs, Mapping), "rendered by now"
            calls = Calls(arguments, serde.localized(serde.simple(dict(self.listener_kwargs)), zone))
            self._made = (self.arguments, calls, "")
        return self._made[1]

    @property
    def _wanted(self) -> int:
        return len(self._calls) if self.first is None else self.first

    @property
    def _text(self) -> str:
        """`_calls`, as the trigger has them."""
        calls = self._calls
        assert self._made is not None
        if not self._made[2]:
            self._made = (self._made[0], calls, packed(calls.encode()))
        return self._made[2]

    @property
    def trigger_length(self) -> int:
        return self._length(self.default if self.has_default else None, self._text)

    def _trigger_arguments(self) -> dict[str, Any]:
        told = super()._trigger_arguments()
        del told["listener_args"], told["listener_kwargs"]
        return {**told, "calls": self._text, "count": len(self._calls), "first": self.first}

    def _starts_in_triggerer(self) -> bool:
        return "first" in vars(self) and super()._starts_in_triggerer()

    def _check_arguments(self) -> None:
        _refuse(self.listener)
        if "first" not in vars(self):  # the constructor of the operator for one event is still at work
            return
        if isinstance(self.arguments, ResolveMixin) or isinstance(self.listener_kwargs, ResolveMixin):
            return
        if self.first is not None and self.first > len(self.arguments):
            raise ValueError(f"first={self.first}, and the list has {len(self.arguments)} items")
        given = [*self.arguments, *self.listener_kwargs.values()]
        if not resolves_at_run_time(given):
            for name in self.template_fields:
                self._check_value(getattr(self, name), name)
        calls = Calls(self.arguments, self.listener_kwargs)
        for index, argument in enumerate(self.arguments):
            if not isinstance(argument, ResolveMixin):
                args, kwargs = calls.of(index)
                try:
                    check_arguments(self.listener, args, kwargs)
                    if not resolves_at_run_time([args, kwargs]):
                        self.listener.check_arguments(*args, **kwargs)
                except TypeError as error:
                    raise TypeError(f"{self.task_id}: arguments[{index}]: {error}") from None
                except ValueError as error:
                    raise ValueError(f"{self.task_id}: arguments[{index}]: {error}") from error
        if self.has_default:
            self._check_default()


class _WaitForEvents(OfTask):
    """
    ``wait_for_events(listener, arguments, **common)``: a task that waits for many events, and its output, a list.

    What is for the task goes to `override`::

        paid = wait_for_events.override(task_id="paid", timeout=timedelta(days=1))(
            KafkaWatchListener, [{"match": {"order": order}} for order in orders], topic="payments"
        )

    :param arguments: as of `WaitForEventsOperator`; ``common`` is its ``listener_kwargs``.
    """

    _mapped = (
        "a mapped one is WaitForEventsOperator.partial(task_id=..., listener=...).expand(arguments=...); "
        "it is in airflow_events.operators.wait_for_events"
    )

    def __call__(
        self, listener: type[EventListener], arguments: Sequence[Any] | XComArg, /, **common: Any
    ) -> XComArg:
        refuse_those_of_task(listener, common, "wait_for_events", WaitForEventsOperator)
        return self._output(
            WaitForEventsOperator,
            "wait_for_events",
            listener=listener,
            arguments=arguments,
            listener_kwargs=common,
        )


wait_for_events = _WaitForEvents()


def _listed(arguments: Any) -> list[Any]:
    if isinstance(arguments, (str, bytes, Mapping)) or not hasattr(arguments, "__iter__"):
        raise TypeError(f"arguments is a list with the arguments of each poll, not {arguments!r:.200}")
    if isinstance(arguments, (set, frozenset)):
        raise TypeError("arguments is a list: the items of a set have another place at each parse; sort them")
    listed: list[Any] = serde.simple(list(arguments))
    return listed


def _refuse(listener: type[EventListener]) -> None:
    if listener.recorded_from_outside:
        raise TypeError(
            f"wait_for_events does not take {listener.__qualname__}: its events come to the API server, which "
            "ends one task with each. Use WaitForEventOperator with it, mapped over the arguments"
        )


__all__ = ["WaitForEventsOperator", "wait_for_events"]
