"""Who has which message of a consumer, by compare-and-set."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from airflow_events.errors import EventLost
from airflow_events.listeners.nats.client import Server, checked
from airflow_events.listeners.nats.messages import Source, Stored
from nats import errors
from nats.js.errors import APIError

log = logging.getLogger(__name__)

# The server's error codes.
_WRONG_REVISION = (10071, 10164)


@dataclass(frozen=True)
class Key:
    """A key of the bucket; revision 0 is one that is not there."""

    revision: int = 0
    value: dict[str, str] = field(default_factory=dict)

    @property
    def wait(self) -> str | None:
        """Whose the message is; None of one that is free."""
        return self.value.get("wait")

    @property
    def committed(self) -> bool:
        return "committed" in self.value

    @property
    def left(self) -> float:
        """Seconds until the claim lapses, below 0 if it has."""
        until = self.value.get("until")
        return (datetime.fromisoformat(until) - _now()).total_seconds() if until else -1.0

    def is_anothers(self, wait: str) -> bool:
        """Whether ``wait`` cannot have the message: it is committed, by whomever, or another holds it."""
        return self.committed or (self.wait != wait and self.left > 0)


class Claims:
    """
    Who has which message of a consumer.

    A wait's key has the message that the wait has chosen, so that all who poll for it choose one. A message's
    key has the wait that claimed or committed it. Both change by compare-and-set only, and the message's key
    alone decides: a choice is no claim, and an acknowledgement no commit.

    To claim is to write the wait's key, then the message's, then to look whether the wait's is still the same.
    Whoever dies in between leaves a choice, which the next who polls for that wait makes a claim, or a message
    that is free, which JetStream gives out again. To commit is to write the message's key, then to acknowledge.
    Whoever dies in between leaves a committed message that JetStream gives out again; it is acknowledged then.
    """

    def __init__(self, server: Server, source: Source) -> None:
        self.server = server
        self._source = source
        self._prefix = f"$KV.{source.bucket}.{source.stream}.{source.durable}"

    async def message(self, message: str) -> Key:
        """Return a message's key."""
        return await self._get(f"{self._prefix}.message.{message}")

    async def chosen(self, wait: str) -> str | None:
        """Return the message that ``wait`` has chosen last."""
        return (await self._get(self._of(wait))).value.get("message")

    async def choose(self, wait: str, lapse: timedelta, message: str, reply: str) -> Stored | None:
        """Return what `held` does, after it chose ``message`` for a wait that holds none."""
        found, revision = await self.held(wait, lapse)
        if found is None:
            await self._put(self._of(wait), revision, {"wait": wait, "message": message, "reply": reply})
            found, _ = await self.held(wait, lapse)
        return found

    async def held(self, wait: str, lapse: timedelta) -> tuple[Stored | None, int]:
        """
        Return the message that ``wait`` holds, and the revision of its choice.

        The message that it has chosen is claimed for it, if it is not another's; who made the choice may be dead.
        """
        while True:
            choice = await self._get(self._of(wait))
            if "message" not in choice.value:  # it is not there, or was deleted
                return None, choice.revision
            message, reply = choice.value["message"], choice.value["reply"]
            mark = await self.message(message)
            if mark.is_anothers(wait):
                return None, choice.revision
            stored = await self.server.message(self._source.stream, seq=int(message.partition("-")[0]))
            if stored is None or stored.id != message:  # the stream has dropped it: there is nothing to deliver
                return None, choice.revision
            if mark.wait == wait and mark.left > 0:
                return stored, choice.revision
            claim = {"wait": wait, "until": (_now() + lapse).isoformat(), "reply": reply}
            if not await self._put(f"{self._prefix}.message.{message}", mark.revision, claim):
                continue
            await self.server.later(reply, lapse.total_seconds())
            if (await self._get(self._of(wait))).revision == choice.revision:
                return stored, choice.revision
            await self.release(message, wait)  # a slower poll than another, which chose anew meanwhile

    async def commit(self, message: str, wait: str) -> None:
        """
        Note that a message is delivered to ``wait``, which has claimed it, and acknowledge it.

        :raises EventLost: another wait has it.
        """
        while True:
            mark = await self.message(message)
            if mark.wait != wait:
                holder = mark.wait or "nobody (the claim was given back, or its key is gone)"
                raise EventLost(f"the message {message} of {self._source} is held by {holder}")
            note = {"wait": wait, "committed": _now().isoformat(), "reply": mark.value["reply"]}
            key = f"{self._prefix}.message.{message}"
            if mark.committed or await self._put(key, mark.revision, note):
                break
        try:
            await self.server.request(mark.value["reply"], b"+ACK")
        except errors.NoRespondersError:
            log.debug("%s has no such consumer any more", self._source)
        except asyncio.TimeoutError:  # JetStream gives it out again, and is told then
            log.debug("The acknowledgement of %s was not confirmed by %s", message, self._source)

    async def release(self, message: str, wait: str) -> None:
        """Free a message that ``wait`` has claimed and not committed; of any other it changes nothing."""
        while True:
            mark = await self.message(message)
            if mark.wait != wait or mark.committed:
                return
            reply = mark.value["reply"]
            free = {"released": _now().isoformat()}
            if await self._put(f"{self._prefix}.message.{message}", mark.revision, free):
                await self.server.later(reply, 0)
                return

    def _of(self, wait: str) -> str:
        # A wait's name may have characters that no subject has.
        return f"{self._prefix}.wait.{hashlib.sha256(wait.encode()).hexdigest()[:32]}"

    async def _get(self, key: str) -> Key:
        # Not a direct get, which a replica may answer that is behind.
        found = await self.server.message(f"KV_{self._source.bucket}", last_by_subj=key)
        if found is None or not found.data:
            return Key(found.sequence if found else 0)
        return Key(found.sequence, json.loads(found.data))

    async def _put(self, key: str, revision: int, value: dict[str, str]) -> bool:
        """Write a key whose revision is still ``revision``; return whether it was."""
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        try:
            checked(await self.server.request(key, json.dumps(value, ensure_ascii=False).encode(), headers))
        except APIError as error:
            if error.err_code not in _WRONG_REVISION:
                raise
            return False
        return True


def _now() -> datetime:
    return datetime.now(timezone.utc)
