"""
What goes on as long as the API server lives.

Kept events are given to waits that begin, parked waits end when they are due, waits are counted, and the inbox is
seen to.
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata

from airflow_events import settings, task_proof
from airflow_events.api import gauges, hosting, keys, seeking, upkeep, variables, waking
from airflow_events.inbox.database import in_transaction, is_of_a_value
from sqlalchemy.exc import OperationalError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# How often a key is matched in a pass: what an event is refused by shows only then who has sent the next.
_ROUNDS = 5


class Matcher:
    """
    A middleware that touches no request: it is there for the API server's start and end.

    Each API server has one. What two of them do at once is decided by the rows that they lock.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._failing = False
        self._took_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            app = _refused if _writes_a_proof(scope) else self.app
            await app(scope, receive, send)
            return
        tasks: list[asyncio.Task[None]] = []

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                works = (
                    self._run(),
                    waking.keep_waking(),
                    hosting.keep_hosts(),
                    seeking.keep_looking(),
                    gauges.keep_telling(),
                    upkeep.keep_up(),
                )
                tasks.extend(asyncio.create_task(work) for work in works)
                for task in tasks:
                    task.add_done_callback(_log_if_failed)
            else:
                for task in tasks:
                    task.cancel()
            return message

        try:
            await self.app(scope, watched, send)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(settings.http_match_interval())
            try:
                if not self._took_over:
                    await asyncio.to_thread(variables.take_over)
                    self._took_over = True
                await asyncio.to_thread(match_once)
            except Exception:
                # Once for each time that the database is unreachable; the events stay where they are.
                log.log(
                    logging.DEBUG if self._failing else logging.ERROR,
                    "Kept events could not be given to the waits that have begun; this is tried again",
                    exc_info=True,
                )
                self._failing = True
            else:
                self._failing = False


def _log_if_failed(task: asyncio.Task[None]) -> None:
    """Log why a task has ended that goes on as long as the API server lives."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("An API server without this does not see to all waits: %s", error, exc_info=error)


_refused = JSONResponse({"detail": f"{task_proof.STATE} is written by the task itself alone"}, 403)


def _writes_a_proof(scope: Scope) -> bool:
    """
    Whether a user writes what only the task itself may: by it an API server knows the task (`task_proof`).

    Airflow's REST API lets whoever may edit a task instance write anything into its state store.
    """
    if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "DELETE"):
        return False
    _, found, key = scope["path"].rpartition("/state-store/")
    letters = unicodedata.normalize("NFKD", key).casefold()  # for MySQL finds by what looks alike
    return bool(found) and "".join(filter(_counts, letters)) == task_proof.STATE


def _counts(letter: str) -> bool:
    return "!" <= letter <= "~"


def _match(key: str) -> dict[str, list[str]]:
    """Match a key; and again, once it is known of all senders of its events to whom they may send."""
    reached: dict[str, list[str]] = {}
    for _ in range(_ROUNDS):
        reached.update(in_transaction(lambda session: keys.match(session, key)))
        if not keys.reaches.ask():
            break
    return reached


def match_once() -> dict[str, list[str]]:
    """
    Match all keys, each in a transaction of its own; return which waits each event reached.

    :raises RuntimeError: a key could not be matched; the others were.
    """
    reached: dict[str, list[str]] = {}
    failed: tuple[str, Exception] | None = None
    for key in in_transaction(keys.wanted):
        try:
            reached.update(_match(key))
        except Exception as error:
            if isinstance(error, OperationalError) and not is_of_a_value(error):
                raise  # the database is unreachable, for the others as well
            failed = key, error
    for event_id, waits in reached.items():
        log.info("The kept event %s went to %s", event_id, ", ".join(waits))
    if failed is not None:
        raise RuntimeError(f"those of the key {failed[0]!r} could not") from failed[1]
    return reached
