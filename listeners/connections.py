"""The Airflow connections that listeners use, by the ids that users give."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from airflow.sdk.bases.hook import BaseHook
from airflow_events.errors import SourceUnfit

if TYPE_CHECKING:
    from airflow.sdk import Connection


async def connection(conn_id: str, *types: str) -> Connection:
    """
    Return an Airflow connection.

    :param types: the connection types that will do, the usual one first.
    :raises AirflowNotFoundException: there is no such connection.
    :raises SourceUnfit: it is of another type.
    """
    found = await BaseHook.aget_connection(conn_id)
    if found.conn_type not in types:
        wanted = " or ".join(map(repr, types))
        raise SourceUnfit(f"the connection {conn_id!r} is of type {found.conn_type!r}, and {wanted} is needed")
    return found


def tls(authorities: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    """
    Return a context that checks the server; it reads files, so not in the event loop.

    :param authorities: a file of those that are trusted; None is the system's.
    :param certificate: the client's own, if it is to have one, and ``key`` its key, if that is in another file.
    """
    context = ssl.create_default_context(cafile=authorities)
    if certificate:
        context.load_cert_chain(certificate, key)
    return context
