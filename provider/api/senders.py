"""
Who sends events to keys, and to the waits of which DAGs they may.

It is asked as an event is sent, and again when one that was kept is given to a wait. Until then its row has what
tells the sender: of a user what the auth manager makes its tokens of, encrypted.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.configuration import conf
from airflow.models.crypto import get_fernet
from airflow.models.dag import DagModel
from airflow_events import settings
from airflow_events.api import webhook_connections
from airflow_events.inbox.database import in_transaction
from cryptography.fernet import InvalidToken
from sqlalchemy import select
from sqlalchemy.orm import Session

log = logging.getLogger(__name__)

Dags = frozenset[str] | None
"""To the waits of which DAGs somebody may send; None for all, also those that do not exist yet."""

_NONE: Dags = frozenset()


class Sender(ABC):
    """What tells a sender later. Rows hold kind and fields: they are frozen."""

    kind: ClassVar[str]

    @abstractmethod
    def dags(self) -> Dags:
        """Ask to whose waits it may send now. It opens transactions of its own."""

    def encrypted(self) -> str:
        """Return it as a row holds it."""
        told = json.dumps([self.kind, asdict(self)])  # type: ignore[call-overload]
        return get_fernet().encrypt(told.encode()).decode()


@dataclass(frozen=True)
class User(Sender):
    """
    A user of Airflow.

    :param claims: what the auth manager makes tokens of, and of those a user again.
    """

    kind = "user"
    claims: dict[str, Any]

    def dags(self) -> Dags:
        user = self.made_again()
        return _NONE if user is None else allowed(user, in_transaction(lambda session: candidates(session, user)))

    def made_again(self) -> BaseUser | None:
        """Return the user as of now; None if there is none (any more), as Airflow finds it of a token."""
        try:
            user: BaseUser = get_auth_manager().deserialize_user(dict(self.claims))
        except (ValueError, KeyError):
            return None
        return user


@dataclass(frozen=True)
class Webhook(Sender):
    """Who signs with a connection's secret."""

    kind = "webhook"
    conn_id: str
    key: str

    def dags(self) -> Dags:
        _, extra = webhook_connections.find(self.conn_id)
        try:
            said = webhook_connections.read(extra)
        except ValueError:
            return _NONE
        if not fnmatch.fnmatchcase(self.key, said.keys):
            return _NONE
        return None if said.dags is None else frozenset(said.dags)


@dataclass(frozen=True)
class Task(Sender):
    """A task, by the DAG that it is of."""

    kind = "task"
    dag_id: str

    def dags(self) -> Dags:
        if not settings.send_from_tasks():
            return _NONE
        return in_transaction(lambda session: dags_of_task(session, self.dag_id))


class Candidates(NamedTuple):
    """
    What is asked of a user's DAGs.

    :param dags: those that the user may edit.
    :param teams: of these.
    :param all_dags: all there are.
    """

    dags: set[str]
    teams: dict[str, str | None]
    all_dags: set[str]


def candidates(session: Session, user: BaseUser) -> Candidates:
    """Return what the database knows of the DAGs that a user may edit."""
    dags = get_auth_manager().get_authorized_dag_ids(user=user, method="PUT", session=session)
    teams = DagModel.get_dag_id_to_team_name_mapping(list(dags), session=session)
    return Candidates(dags, teams, set(session.scalars(select(DagModel.dag_id))))


def allowed(user: BaseUser, found: Candidates) -> Dags:
    """Return the DAGs whose task instances a user may edit. No connection of ours is held meanwhile."""
    dags = frozenset(dag_id for dag_id in found.dags if _may_send(user, dag_id, found))
    return None if dags and dags >= found.all_dags else dags


def _may_send(user: BaseUser, dag_id: str, found: Candidates) -> bool:
    return get_auth_manager().is_authorized_dag(
        method="PUT",
        access_entity=DagAccessEntity.TASK_INSTANCE,
        details=DagDetails(id=dag_id, team_name=found.teams.get(dag_id)),
        user=user,
    )


def reach_of(user: BaseUser, found: Candidates) -> tuple[Dags, User | None]:
    """
    Return to whose waits a user may send, and what tells the user later.

    That is None if the auth manager does not know its users by their claims, as Keycloak's, which asks by a token
    of theirs: of such a user it counts what was so as the event was sent.
    """
    dags = allowed(user, found)
    one = next(iter(found.dags if dags is None else dags), None)
    if one is None:
        return dags, None
    sender = User(get_auth_manager().serialize_user(user))
    try:
        again = sender.made_again()
        is_known = again is not None and _may_send(again, one, found)
    except Exception:
        log.debug("The auth manager has no answer for the claims of a user", exc_info=True)
        is_known = False
    return dags, sender if is_known else None


def dags_of_task(session: Session, dag_id: str) -> Dags:
    """Return to the waits of which DAGs a task may send: where there are teams, to those of its own."""
    if not conf.getboolean("core", "multi_team", fallback=False):
        return None
    teams = _teams(session)
    return frozenset(other for other, team in teams.items() if team == teams.get(dag_id))


def _teams(session: Session) -> dict[str, str | None]:
    dags = list(session.scalars(select(DagModel.dag_id)))
    named = DagModel.get_dag_id_to_team_name_mapping(dags, session=session)
    return {dag_id: named.get(dag_id) for dag_id in dags}


_KINDS: dict[str, type[Sender]] = {each.kind: each for each in (User, Webhook, Task)}


class Reaches:
    """
    To whose waits the senders of kept events may send now.

    Whoever gives kept events has rows locked, and is told what is known. The rest is asked afterwards, outside of
    that transaction, for an auth manager may ask elsewhere; then it is known for some seconds.
    """

    _LONGEST = 10.0  # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Dags, float]] = {}
        self._wanted: set[str] = set()
        self._failing = False

    def has(self, sender: str | None, dag_id: str) -> bool | None:
        """
        Whether a sender may send to the waits of a DAG; None if that has to be asked (`ask`).

        :param sender: as its row has it; None if it has none, and what was so as the event was sent counts.
        """
        if sender is None:
            return True
        try:
            told = get_fernet().decrypt(sender.encode()).decode()
        except InvalidToken:
            log.warning("Who has sent a kept event cannot be read: is [core] fernet_key another one?")
            return False
        with self._lock:
            dags, asked = self._known.get(told, (_NONE, float("-inf")))
            if time.monotonic() - asked > self._LONGEST:
                self._wanted.add(told)
                return None
        return dags is None or dag_id in dags

    def ask(self) -> bool:
        """Ask what `has` did not know; return whether anything is known now that was not."""
        with self._lock:
            wanted, self._wanted = self._wanted, set()
        found, trouble = {}, None
        for told in wanted:
            kind, fields = json.loads(told)
            try:
                found[told] = _KINDS[kind](**fields).dags(), time.monotonic()
            except Exception as error:
                trouble = error
        if trouble is not None:  # once for each time that it cannot be asked
            level = logging.DEBUG if self._failing else logging.WARNING
            log.log(level, "What senders of kept events may do cannot be asked; the events wait", exc_info=trouble)
        if wanted:
            self._failing = trouble is not None
        with self._lock:
            long_ago = time.monotonic() - self._LONGEST
            self._known = {told: one for told, one in self._known.items() if one[1] > long_ago} | found
        return bool(found)
