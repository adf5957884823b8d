"""``EventHook``: by which a task sends events to waits of other DAGs, or of its own."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from uuid import UUID

import httpx
from airflow.sdk import get_current_context
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import SetTaskStateStore
from airflow_events import settings, task_proof
from airflow_events.errors import EventNotSent
from airflow_events.listeners.http import check_key
from airflow_events.listeners.support import serde
from airflow_events.listeners.support.values import seconds
from airflow_events.triggers.inbox_http import detail, tls

log = logging.getLogger(__name__)

# Seconds.
_TIMEOUT = httpx.Timeout(30, connect=10)
# With an API server that is unreachable; then the try fails, and the next one sends the same again.
_PATIENCE = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_PROOF_LASTS = timedelta(days=1)  # in the task's state store, from which `airflow db clean` removes it then


class EventHook:
    """
    Sends events to waits of ``HttpListener(key=...)``, from a task that runs on a worker.

    The task sends by its own authority, and needs no password: `airflow_events.task_proof` says how. From a task
    that is a coroutine it is to be called in a thread (``asyncio.to_thread``), since it waits for its answer.
    """

    def send(
        self,
        key: str,
        event: Any,
        *,
        to: Literal["one", "all"] = "one",
        ttl: timedelta | float | None = None,
        name: str | None = None,
    ) -> dict[str, Any]:
        """
        Send an event to the waits with a key, once for all tries of this task.

        :param event: any JSON, and what stands for it: a path, a UUID or a member of an Enum for its text or
            value, a moment for ISO 8601, a timedelta for seconds, a set or a mapped task's outputs for a list.
        :param to: ``one``: the wait that has waited longest, or the first that begins; ``all``: those that wait
            now, and those that begin within ``ttl``, if there is one.
        :param ttl: for how long the event is kept, a timedelta or seconds; None is ``[events] http_keep`` for one
            wait, and not at all for all.
        :param name: what tells this event from others that the task sends to the same key; None: their number,
            in the order in which the task sends them. A task that is deferred or rescheduled between two of them
            gives them names, since each of its processes counts from 1.
        :return: ``status`` (``delivered`` or ``kept``), ``event_id``, ``key``, and ``waits``, those that have it.
        :raises EventNotSent: the API server has refused the event, or could not be asked.
        :raises ValueError: the key is no text of 1 to 256 characters, ``ttl`` no time, or the event is no JSON.
        :raises RuntimeError: no task runs here.
        """
        if to not in ("one", "all"):
            raise ValueError(f"an event goes to 'one' or to 'all', not to {to!r}")
        if type(getattr(task_runner, "SUPERVISOR_COMMS", None)).__name__ == "InProcessSupervisorComms":
            raise EventNotSent(key, "dag.test() has no API server, to which it would be sent")
        key, sender = check_key(key), _sender_of(get_current_context()["ti"].id)
        body = _json(
            {
                "key": key,
                "event": serde.simple(event),
                "to": to,
                "ttl": None if ttl is None else seconds(ttl, "ttl"),
                "name": sender.name(key, name),
            }
        )
        answer = _answer(key, lambda client: sender.post(client, body))
        if answer.pop("differs"):
            log.warning(
                "An earlier try of this task has sent another event to the key %r in the place of this one, and "
                "that one counts; give events of which the task does not always send the same a name",
                key,
            )
        log.info("The event %s for the key %r is %s", answer["event_id"], key, answer["status"])
        return answer


def _json(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the event is not valid JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if (shape := serde.as_json_has_it(value)) is value:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return shape


@dataclass
class _Sender:
    """What this process knows of the try that it runs."""

    ti: UUID
    _proof: str = ""
    _sent: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)  # a task may send in several threads

    def name(self, key: str, given: str | None) -> str:
        """Return what tells an event from others to the same key, the same in all tries."""
        if given is not None:
            return f"={given}"
        with self._lock:
            self._sent[key] += 1
            return str(self._sent[key])

    def post(self, client: httpx.Client, body: bytes) -> httpx.Response:
        """Send a request, and prove once more who sends it where the proof is not known any more."""
        proof = self._proof
        response = self._post(client, body, proof) if proof else None
        if response is None or response.status_code == httpx.codes.UNAUTHORIZED:
            with self._lock:
                if self._proof == proof:  # and no other thread has proved it meanwhile
                    self._prove()
            response = self._post(client, body, self._proof)
        return response

    def _post(self, client: httpx.Client, body: bytes, proof: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {proof}", "Content-Type": "application/json"}
        return client.post(f"{settings.api_url()}/tasks/{self.ti}/events", content=body, headers=headers)

    def _prove(self) -> None:
        proof = task_proof.new()
        expires = datetime.now(timezone.utc) + _PROOF_LASTS
        # Not by the context's state store, whose backend may keep values where no API server looks.
        stored = SetTaskStateStore(
            ti_id=self.ti, key=task_proof.STATE, value=task_proof.digest(proof), expires_at=expires
        )
        task_runner.SUPERVISOR_COMMS.send(stored)
        self._proof = proof


_sender: _Sender | None = None
_making = threading.Lock()


def _sender_of(ti: UUID) -> _Sender:
    global _sender
    with _making:
        if _sender is None or _sender.ti != ti:
            _sender = _Sender(ti)
        return _sender


def _answer(key: str, post: Callable[[httpx.Client], httpx.Response]) -> dict[str, Any]:
    """Return the answer to a request that may be sent again, and is, for a while."""
    until, pause = time.monotonic() + _PATIENCE, _FIRST_PAUSE
    with httpx.Client(verify=tls(), timeout=_TIMEOUT) as client:
        while True:
            try:
                response = post(client)
            except httpx.TransportError as error:
                failed = EventNotSent(key, f"{settings.api_url()} could not be asked: {error!r}")
                failed.__cause__ = error
            else:
                if response.is_success:
                    answer: dict[str, Any] = response.json()
                    return answer
                failed = EventNotSent(key, f"{response.status_code} {detail(response)}", response.status_code)
                if not response.is_server_error:
                    raise failed
            if time.monotonic() + pause > until:
                raise failed
            log.warning("%s; this is tried again", failed)
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE)
