"""``wait_for_event``, and the operator behind it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone, tzinfo
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from airflow.sdk.bases.decorator import get_unique_task_id
from airflow.sdk.bases.operator import BaseOperator
from airflow.sdk.definitions._internal.mixins import ResolveMixin
from airflow.sdk.definitions.xcom_arg import XComArg
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowSensorTimeout,
    AirflowSkipException,
    TaskDeferralTimeout,
)
from airflow.triggers.base import StartTriggerArgs
from airflow_events import settings
from airflow_events.errors import EventNotSerializable, EventRejected, UnknownOutcome
from airflow_events.listeners.base import EventListener, Wait, check_arguments, check_listener
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.commit import delivered
from airflow_events.operators.placement import placement, resolves_at_run_time
from airflow_events.triggers import outcome, reference
from airflow_events.triggers.event import GRACE, EventTrigger

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context
    from typing_extensions import Self


class _Missing:
    """The type of `MISSING`; its repr must not have an address in it, which would change with each parse."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()
_LONGEST = timedelta(days=3650)
"""How long a timeout may be; MySQL knows no moment after January 2038, at which one that is longer ends."""
_FAR_OFF = timedelta(days=365)


class _StartFromTrigger:
    """
    ``start_from_trigger`` and ``start_trigger_args``, which Airflow reads when it serializes the DAG.

    They depend on what is set after the operator was made, such as outlets, so they are worked out when
    they are read. Of the class, which is what Airflow reads for mapped tasks, they are off.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._wanted = "_start_trigger_args" if name == "start_trigger_args" else "_starts_in_triggerer"
        self._off = None if name == "start_trigger_args" else False

    def __get__(self, task: WaitForEventOperator | None, owner: type) -> Any:
        # Airflow looks after each constructor on the way, before there is all to see: a subclass may set a
        # template field of its own after this class's.
        if task is None or not all(hasattr(task, name) for name in ("replay", *task.template_fields)):
            return self._off
        return getattr(task, self._wanted)()

    def __set__(self, task: WaitForEventOperator, value: Any) -> None:
        raise AttributeError("where a wait starts follows from its arguments; see operators/placement.py")


class _ListenerName:
    """
    ``custom_operator_name``, which Airflow shows and stores with each task instance: the listener's name.

    Of the class, which is what Airflow reads for mapped tasks, it is the class's own name.
    """

    def __get__(self, task: WaitForEventOperator | None, owner: type) -> str:
        listener = vars(task).get("listener") if task is not None else None
        return owner.__name__ if listener is None else str(listener.__name__)


class WaitForEventOperator(BaseOperator):
    """
    Wait for an event, and return it.

    It is deferred from its beginning on, and most waits never see a worker (``operators/placement.py`` has the
    rule). The event is recorded in Airflow's database before the source is told to forget it, so a try
    that dies at any point leaves a state from which the next one goes on: the defaults of ``retries`` and
    ``retry_delay`` are for that.

    :param listener: the class that knows the source.
    :param listener_args: for its ``poll_for_event``: literals, templates, outputs of other tasks.
    :param listener_kwargs: likewise. A naive datetime in either is in the DAG's time zone.
    :param timeout: how long to wait in all, retries included, a timedelta or seconds; None waits forever.
        When it is over the task fails with ``AirflowSensorTimeout`` and is not tried again.
    :param soft_fail: when the time is over, skip the task instead.
    :param default: when the time is over, deliver this instead. It is no event: a clear waits again.
    :param replay: what a clear does with an event that was recorded: deliver it again, or, if False, wait
        for another. A retry delivers it always.
    """

    template_fields: Sequence[str] = ("listener_args", "listener_kwargs")
    template_fields_renderers: ClassVar[dict[str, str]] = {"listener_args": "json", "listener_kwargs": "json"}
    ui_color = "#d9ead3"
    ui_fgcolor = "#1f3d1f"
    custom_operator_name = _ListenerName()
    trigger_class: ClassVar[type[EventTrigger]] = EventTrigger
    arguments_as_text: ClassVar[bool] = False
    """Whether the trigger gets the arguments as text, which a serialized DAG keeps whatever they are."""
    start_from_trigger = _StartFromTrigger()
    start_trigger_args = _StartFromTrigger()

    def __init__(
        self,
        *,
        listener: type[EventListener],
        listener_args: Sequence[Any] | XComArg = (),
        listener_kwargs: Mapping[str, Any] | XComArg | None = None,
        timeout: timedelta | float | None = None,
        soft_fail: bool = False,
        default: Any = MISSING,
        replay: bool = True,
        retries: int = 3,
        retry_delay: timedelta | float = timedelta(seconds=10),
        **kwargs: Any,
    ) -> None:
        super().__init__(retries=retries, retry_delay=retry_delay, **kwargs)
        self.listener = check_listener(listener)
        # What stands for something simpler is that before it is rendered, wherever that is done.
        self.listener_args = _positional(listener_args)
        self.listener_kwargs = _by_name(listener_kwargs)
        self.timeout = timeout
        inherited = kwargs.get("default_args") or {}
        self.soft_fail, self.default = _when_time_is_over(timeout, soft_fail, default, inherited)
        self.replay = _switch("replay", replay)
        self._check_arguments()

    @property
    def timeout(self) -> timedelta | None:
        """How long to wait in all; a cluster policy may set it as the constructor takes it."""
        return self._timeout

    @timeout.setter
    def timeout(self, timeout: timedelta | float | None) -> None:
        self._timeout = _positive(timeout)

    @property
    def has_default(self) -> bool:
        """Whether something is delivered when the time is over."""
        return self.default is not MISSING

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Fix arguments of a mapped wait; a listener that is none is refused here, when the DAG is parsed."""
        if "listener" in kwargs:
            _refuse_pickle(check_listener(kwargs["listener"]))
        _positive(kwargs.get("timeout"))
        _switch("replay", kwargs.get("replay", True))
        # The timeout may come from the default arguments of a DAG or a group, or be mapped over.
        if kwargs.get("soft_fail", False) and kwargs.get("default", MISSING) is not MISSING:
            raise ValueError(_ONE_OF_BOTH)
        return super().partial(**kwargs)

    @classmethod
    def get_serialized_fields(cls) -> frozenset[str]:
        """Let a serialized DAG say what waits there."""
        return frozenset({"event_wait", "returns_dag_result", *super().get_serialized_fields()})  # type: ignore[no-untyped-call]

    @property
    def event_wait(self) -> str | None:
        """What those need to know who send an event to the wait, also before it begins, as JSON."""
        if "replay" not in vars(self):  # BaseOperator's constructor is still at work
            return None
        face: dict[str, Any] = {"listener": reference.name(self.listener), "replay": self.replay}
        if self.listener.recorded_from_outside and isinstance(self.listener_kwargs, Mapping):
            schema = self.listener_kwargs.get("schema")
            if not resolves_at_run_time(schema):
                face["schema"] = schema
        return json.dumps(face, sort_keys=True)

    def execute(self, context: Context) -> Any:
        """Begin a try that starts on a worker: what the wait has already, its trigger is told."""
        self._defer(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on with what the trigger found: what is delivered is recorded and committed."""
        match outcome.decode(event):
            case outcome.Arrived(arrived, at):
                delivered(self.listener, Wait(**self._named(context)), at)
                return arrived
            case outcome.Rejected(reason, by):
                rejected = EventRejected(reason, by)
                raise AirflowFailException(str(rejected)) from rejected
            case outcome.TimedOut(deadline):
                return self._time_is_up(f"until {deadline.isoformat(timespec='seconds')}")
            case other:
                raise UnknownOutcome(f"{type(other).__name__} is for a task that waits for many events")

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """
        Go on after a deferral, also if Airflow ended it because no triggerer was there in time.

        It does so only as long as no event is recorded: with the record, the inbox takes the timeout away, and the
        API server that of a later try. So there is nothing to ask the inbox for here.
        """
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            if self.timeout is None or (self.execution_timeout and self.execution_timeout <= self.timeout):
                raise  # not the wait's timeout, but the task's execution_timeout
            return self._airflow_has_ended_it(context)

    def _airflow_has_ended_it(self, context: Context) -> Any:
        return self._time_is_up(f"within {self.timeout}, and no triggerer was there to say so in time")

    def _time_is_up(self, until: str) -> Any:
        message = f"No event of {self.listener.__qualname__} came {until}"
        if self.has_default:
            self.log.info("%s; delivering the default", message)
            return self._told_default[0]  # as the trigger would
        if self.soft_fail:
            raise AirflowSkipException(message)
        raise AirflowSensorTimeout(message)

    def _read_outputs(self) -> None:
        """
        Read the outputs of a mapped task, which Airflow reads one by one, once, and while they can be read.

        :raises TypeError: the output of a task in the place of all arguments is of another shape.
        """
        self.listener_args = _positional(serde.simple(self.listener_args))
        self.listener_kwargs = _by_name(serde.simple(self.listener_kwargs))

    def _defer(self, context: Context) -> None:
        self._read_outputs()
        self._check_arguments()
        named = self._named(context)
        is_mapped = named["map_index"] >= 0
        # As the DAG has it: of this one the arguments are rendered.
        unrendered = self.dag.get_task(self.task_id) if self.has_dag() else self  # type: ignore[no-untyped-call]
        why: str | None = "it is mapped"
        if isinstance(unrendered, WaitForEventOperator):
            why = placement(unrendered).starts_on_worker_because
        why_again = placement(self).finishes_on_worker_because
        self.log.info(
            "%s; %s",
            f"A worker begins this wait because {why}" if why else "A worker lets this wait go on",
            f"a worker ends it because {why_again}" if why_again else "it ends in the triggerer",
        )
        left = self._longest
        if self.execution_timeout is not None:
            # Of the whole try, with what it is deferred, as Airflow documents it and the scheduler has it for the
            # tasks that it defers; for those that workers defer it leaves that to them.
            of_try = context["ti"].start_date + self.execution_timeout - datetime.now(timezone.utc)
            left = max(of_try if left is None else min(of_try, left), timedelta())
        trigger = self.trigger_class(
            wait=named,
            mapped_over=not is_mapped and next(iter(self.iter_mapped_dependants()), None) is not None,
            dag_result=bool(getattr(unrendered, "returns_dag_result", False)),
            **self._trigger_arguments(),
        )
        trigger.show_as_here()
        self.defer(trigger=trigger, method_name="execute_complete", timeout=left)

    def _named(self, context: Context) -> dict[str, Any]:
        """Return the wait, as its trigger is told."""
        ti = context["ti"]
        return {
            "dag_id": ti.dag_id,
            "run_id": ti.run_id,
            "task_id": ti.task_id,
            "map_index": ti.map_index if ti.map_index is not None else -1,
            "run_start": context["dag_run"].start_date,
            "timezone": timezone_name(self),
        }

    @property
    def _longest(self) -> timedelta | None:
        """
        After what time Airflow ends a deferral; the inbox makes it the wait's deadline and a grace.

        None for one that is far off: it may be a moment that MySQL does not know, which would end the scheduler.
        """
        if self.timeout is None or self.timeout > _FAR_OFF:
            return None
        return self.timeout + timedelta(seconds=GRACE)

    @property
    def trigger_length(self) -> int:
        """How long what the trigger is made of is as text, but for a few hundred characters."""
        default = self.default if self.has_default else None
        told = [self.listener_args, self.listener_kwargs, default]
        return self._length(told)

    def _length(self, told: Any, *more: str) -> int:
        text = serde.encode(serde.localized(serde.simple(told), timezone.utc))
        return sum(map(len, [text, str(reference.refer(self.listener)), *more]))

    @property
    def _told_default(self) -> list[Any]:
        """The default as a trigger is told it: a list of one item, or empty for none."""
        if not self.has_default:
            return []
        return [serde.localized(serde.simple(self.default), self._zone)]

    @property
    def _zone(self) -> tzinfo:
        """The DAG's time zone, in which naive moments are."""
        return Wait("", "", "", timezone=timezone_name(self)).tz

    def _trigger_arguments(self) -> dict[str, Any]:
        zone = self._zone
        return {
            "listener": reference.refer(self.listener),
            "listener_args": serde.localized(serde.simple(self.listener_args), zone),
            "listener_kwargs": serde.localized(serde.simple(self.listener_kwargs), zone),
            "finish_on_worker": placement(self).finishes_on_worker_because or False,
            "timeout": self.timeout.total_seconds() if self.timeout else None,
            "soft_fail": self.soft_fail,
            "default": self._told_default,
            "push": self.do_xcom_push,
            "multiple_outputs": bool(self.multiple_outputs),
            "outlets": _profiles(self.outlets),
            "replay": self.replay,
        }

    def _starts_in_triggerer(self) -> bool:
        return placement(self).starts_on_worker_because is None

    def _start_trigger_args(self) -> StartTriggerArgs | None:
        if not self._starts_in_triggerer():
            return None
        return StartTriggerArgs(
            trigger_cls=f"{self.trigger_class.__module__}.{self.trigger_class.__name__}",
            trigger_kwargs=self._trigger_arguments(),
            next_method="execute_complete",
            timeout=self._longest,
        )

    def _check_arguments(self) -> None:
        _refuse_pickle(self.listener)
        for name, value in (("listener_args", self.listener_args), ("listener_kwargs", self.listener_kwargs)):
            if not resolves_at_run_time(value):
                self._check_value(value, name)
        if not isinstance(self.listener_args, ResolveMixin) and not isinstance(self.listener_kwargs, ResolveMixin):
            check_arguments(self.listener, self.listener_args, self.listener_kwargs)
            if not resolves_at_run_time([self.listener_args, self.listener_kwargs]):
                try:
                    self.listener.check_arguments(*self.listener_args, **self.listener_kwargs)
                except ValueError as error:
                    raise ValueError(f"{self.task_id}: {error}") from error
        if self.has_default:
            self._check_default()

    def _check_default(self) -> None:
        if resolves_at_run_time(self.default):
            raise TypeError(f"{self.task_id}: default is a literal, and no output of another task")
        self._check_value(self.default, "default")

    def _check_value(self, value: Any, name: str) -> None:
        """
        Check what goes to the triggerer.

        :raises TypeError: Airflow does not store it, or a triggerer could not read it, which would end it.
        """
        value = serde.simple(value)
        try:
            serde.check(value, name)
        except EventNotSerializable as error:
            raise TypeError(f"{self.task_id}: {error}") from error
        for place, kind in serde.classes(value):
            if not reference.is_importable(kind):
                raise TypeError(
                    f"{self.task_id}: {name}{place} is a {kind.__qualname__}, which a triggerer cannot import: "
                    "give its fields, or move it to an installed package"
                )


_ONE_OF_BOTH = "soft_fail skips the task when the time is over, default delivers a value: give one"


class OfTask:
    """A call that makes a task and returns its output, and what it is to hand to the operator."""

    _mapped: ClassVar[str] = (
        "a mapped wait is WaitForEventOperator.partial(task_id=..., listener=...).expand(listener_args=...); "
        "it is in airflow_events.operators.wait_for_event. One task for many events is wait_for_events"
    )

    def __init__(self, operator_arguments: Mapping[str, Any] | None = None) -> None:
        self._operator_arguments = dict(operator_arguments or {})

    def override(self, **operator_arguments: Any) -> Self:
        """Return the same with other arguments of the operator."""
        return type(self)({**self._operator_arguments, **operator_arguments})

    def expand(self, *_: Any, **__: Any) -> NoReturn:
        """Say how it is done."""
        raise TypeError(self._mapped)

    partial = expand_kwargs = expand

    def _output(self, operator: type[BaseOperator], task_id: str, **call: Any) -> XComArg:
        arguments = dict(self._operator_arguments)
        unique = get_unique_task_id(
            arguments.pop("task_id", task_id), arguments.get("dag"), arguments.get("task_group")
        )
        return operator(task_id=unique, **call, **arguments).output


class _WaitForEvent(OfTask):
    """
    ``wait_for_event(listener, *args, **kwargs)``: a task that waits for one event, and its output.

    ``args`` and ``kwargs`` go to the listener's ``poll_for_event``; they may be literals, templates and the
    outputs of other tasks. What is for the task goes to `override`, as in TaskFlow::

        order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(MyListener, "orders")
    """

    def __call__(self, listener: type[EventListener], /, *args: Any, **kwargs: Any) -> XComArg:
        refuse_those_of_task(listener, kwargs)
        return self._output(
            WaitForEventOperator, "wait_for_event", listener=listener, listener_args=args, listener_kwargs=kwargs
        )


wait_for_event = _WaitForEvent()


def _positive(timeout: timedelta | float | None) -> timedelta | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (timedelta, int, float)):
        raise TypeError(f"timeout is a timedelta, a number of seconds or None, not {timeout!r}")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if not seconds > 0:
        raise ValueError(f"timeout must be positive, not {timeout!r}")
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"timeout is at most {_LONGEST}, not {timeout!r}; None waits for ever")
    return timedelta(seconds=seconds)


def _switch(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}")
    return value


def _when_time_is_over(
    timeout: Any, soft_fail: bool, default: Any, inherited: Mapping[str, Any]
) -> tuple[bool, Any]:
    """
    Return what is done when the time is over.

    :param inherited: the default arguments of the DAG, of which those that do not fit mean other tasks.
    :raises ValueError: there is no timeout, or both are given.
    """
    _switch("soft_fail", soft_fail)
    if inherited.get("soft_fail") is soft_fail and (timeout is None or default is not MISSING):
        soft_fail = False
    if timeout is None and "default" in inherited:
        default = MISSING
    if soft_fail and default is not MISSING:
        raise ValueError(_ONE_OF_BOTH)
    if timeout is None and (soft_fail or default is not MISSING):
        raise ValueError("soft_fail and default are for when the time is over, and there is no timeout")
    return soft_fail, default


def _positional(arguments: Any) -> Any:
    if isinstance(arguments, ResolveMixin):
        return arguments
    if not isinstance(arguments, (list, tuple)):
        raise TypeError(
            f"listener_args is a list of positional arguments, not {arguments!r:.200}; of named ones there is "
            "listener_kwargs"
        )
    return serde.simple(list(arguments))


def _by_name(arguments: Any) -> Any:
    if arguments is None or isinstance(arguments, ResolveMixin):
        return arguments or {}
    if not isinstance(arguments, Mapping):
        raise TypeError(f"listener_kwargs is a mapping of named arguments, not {arguments!r:.200}")
    return serde.simple(dict(arguments))


def refuse_those_of_task(
    listener: type[EventListener],
    kwargs: Mapping[str, Any],
    by: str = "wait_for_event",
    operator: type[BaseOperator] = WaitForEventOperator,
) -> None:
    """
    Check that no argument of the task stands among the listener's.

    :param by: what the DAG's author calls; ``operator`` is what that makes.
    :raises TypeError: one does; the message says where it belongs.
    """
    taken = inspect.signature(check_listener(listener).poll_for_event).parameters
    if any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return
    for name in kwargs:
        if name in taken or name in listener.not_taken:
            continue
        if any(name in inspect.signature(task).parameters for task in (operator, BaseOperator)):
            raise TypeError(
                f"{name} is an argument of the task, and not of {listener.__qualname__}: "
                f"{by}.override({name}=...)({listener.__qualname__}, ...)"
            )


def _refuse_pickle(listener: type[EventListener]) -> None:
    if not settings.pickled_listeners() and not reference.is_importable(listener):
        raise ValueError(
            f"{listener.__qualname__} is defined beside the DAG, so it would go to the triggerer as a pickle, "
            "which [events] pickled_listeners = False refuses; move it to an installed package or the "
            "plugins folder"
        )


def _profiles(outlets: Sequence[Any]) -> list[dict[str, Any]]:
    """Write a task's outlets as Airflow's execution API takes them."""
    from airflow.sdk.definitions.asset import Asset, AssetAlias, AssetNameRef, AssetUriRef

    profiles = []
    for outlet in outlets:
        kind = next(
            (kind for kind in (Asset, AssetNameRef, AssetUriRef, AssetAlias) if isinstance(outlet, kind)), None
        )
        if kind is not None:
            name, uri = getattr(outlet, "name", None), getattr(outlet, "uri", None)
            profiles.append({"name": name, "uri": uri, "type": kind.__name__})
    return profiles


def timezone_name(task: BaseOperator) -> str:
    """Return the name of the task's DAG's time zone."""
    return str(getattr(task.dag.timezone, "name", "UTC")) if task.has_dag() else "UTC"


__all__ = ["MISSING", "WaitForEventOperator", "wait_for_event"]
