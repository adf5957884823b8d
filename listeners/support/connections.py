"""
The Airflow connections that listeners use, by the ids that users give, and what is said in them.

What a connection says is used or refused, by its name. A misspelt extra that is passed over would be a connection
without TLS, or with another login, and nobody would know.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import ssl
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.sdk.bases.hook import BaseHook
from airflow_events.errors import SourceMisconfigured

if TYPE_CHECKING:
    from airflow.sdk import Connection

_TRUTH = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip
# What a certificate or a key begins with that stands in the connection itself, and not in a file that it names.
_PEM = "-----BEGIN "
# Characters that a path has at most (PATH_MAX); what is longer may be a secret.
_LONGEST_PATH = 4096


class Endpoint(NamedTuple):
    """A host that a connection names; ``scheme`` is empty, and ``port`` None, if it does not say."""

    scheme: str
    host: str
    port: int | None

    def address(self, port: int) -> str:
        """Return ``host:port``, with ``port`` where there is none."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port or port}"


async def connection(conn_id: str, *types: str) -> Connection:
    """
    Return an Airflow connection.

    :param types: the connection types that will do, the usual one first.
    :raises AirflowNotFoundException: there is no such connection.
    :raises SourceMisconfigured: it is of another type.
    """
    found = await BaseHook.aget_connection(conn_id)
    if found.conn_type not in types:
        wanted = " or ".join(map(repr, types))
        raise SourceMisconfigured(
            f"the connection {conn_id!r} is of type {found.conn_type!r}, and {wanted} is needed"
        )
    return found


def extras(found: Connection) -> dict[str, Any]:
    """
    Return the extras of a connection that have a value: a form sends those that were left empty as None.

    :raises SourceMisconfigured: they cannot be read. Airflow would take them as none at all.
    """
    told: Any = found.extra_dejson  # which masks in logs what is secret of it
    if found.extra:
        try:
            told = json.loads(found.extra)
        except ValueError as error:
            raise misconfigured(found, "has extras that are not valid JSON") from error
        if not isinstance(told, dict):
            raise misconfigured(found, "has extras that are not a JSON object")
    return {name: value for name, value in told.items() if value is not None}


def known_extras(
    found: Connection, known: Collection[str], refused: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """
    Return the extras of a connection that have a value; empty text is none.

    :param known: the names of those that mean something.
    :param refused: others that people have, and why they are refused.
    :raises SourceMisconfigured: there is another one; it names those that are known, and the one that may be
        meant.
    """
    told = {name: value for name, value in extras(found).items() if value != ""}
    check_extras(found, told, known, refused)
    return told


def check_extras(
    found: Connection, told: Collection[str], known: Collection[str], refused: Mapping[str, str] | None = None
) -> None:
    """
    Check that the extras by these names are known.

    :raises SourceMisconfigured: as `known_extras` has it.
    """
    for name in told:
        if name in (refused or {}):
            raise misconfigured(found, f"has an extra {name!r}, which is refused: {(refused or {})[name]}")
    if unknown := [name for name in told if name not in known]:
        names = " and ".join(map(repr, unknown))
        raise misconfigured(
            found,
            f"has an extra {names}, which is not known here"
            f"{''.join(_meant(name, known) for name in unknown)}; known are {', '.join(sorted(known))}",
        )


def _meant(name: str, known: Collection[str]) -> str:
    plain = {each.lower().replace("-", "_").replace(".", "_"): each for each in known}
    asked = name.lower().replace("-", "_").replace(".", "_")
    close = difflib.get_close_matches(asked, plain, 1, 0.6)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def misconfigured(found: Connection, what: str) -> SourceMisconfigured:
    """Return the error that says ``what`` of a connection."""
    return SourceMisconfigured(f"the connection {found.conn_id!r} {what}")


def flag(found: Connection, told: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """
    Return an extra that is yes or no; in a connection's URI it is text.

    :raises SourceMisconfigured: it is neither.
    """
    value = told.get(name, default)
    truth = _TRUTH.get(str(value).strip().lower())
    if truth is None:
        raise misconfigured(found, f"has the extra {name}={value!r}, where true or false is needed")
    return truth


def number(found: Connection, told: Mapping[str, Any], name: str, default: int) -> int:
    """
    Return an extra that is a whole number, from 0 on.

    :raises SourceMisconfigured: it is none.
    """
    value = told.get(name, default)
    if isinstance(value, bool) or not str(value).strip().isdecimal():
        raise misconfigured(found, f"has the extra {name}={value!r}, where a whole number is needed")
    return int(value)


def secure(found: Connection, told: Mapping[str, Any], name: str, by_scheme: bool, files: Sequence[str]) -> bool:
    """
    Return whether a connection is to be by TLS.

    :param name: the extra that says so. That it says no counts for nothing: a form says it unless it is asked.
    :param by_scheme: whether its type or its host's scheme says so.
    :param files: the extras that mean nothing without TLS.
    :raises SourceMisconfigured: there is one of these, and no TLS.
    """
    wanted = flag(found, told, name) or by_scheme
    if not wanted and (idle := [file for file in files if file in told]):
        raise misconfigured(found, f"has the extra {idle[0]!r}, which is for TLS, and no {name}=true")
    return wanted


def endpoints(found: Connection, *schemes: str) -> list[Endpoint]:
    """
    Return the hosts of a connection, which are separated by commas; ``localhost`` if it has none.

    Each may have a port, else it has the connection's; and a scheme, as in ``tls://a:4222``.

    :param schemes: those that will do.
    :raises SourceMisconfigured: a host has more, such as a login, or cannot be read.
    """
    return hosts(found, found.host or "localhost", *schemes)


def hosts(found: Connection, text: str, *schemes: str) -> list[Endpoint]:
    """Return the hosts that ``text`` of a connection names, as `endpoints` does those of its host."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [_endpoint(found, part, schemes) for part in parts or [""]]


def _endpoint(found: Connection, text: str, schemes: Sequence[str]) -> Endpoint:
    scheme, _, rest = text.rpartition("://")
    rest = rest.rstrip("/")
    if "@" in rest:  # not told: there may be a password in it
        raise misconfigured(found, "has a login within its host; put it into the fields for login and password")
    if scheme and scheme not in schemes:
        wanted = f"{' or '.join(f'{each}://' for each in schemes)} is" if schemes else "none is"
        raise misconfigured(found, f"has a host that begins with {scheme}://, and {wanted} needed")
    if "/" in rest or "?" in rest:
        raise misconfigured(found, f"has the host {text!r}, where only a name and a port may be")
    host, port = _host_and_port(rest)
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise misconfigured(found, f"has the host {text!r}, which is no name, or has no port from 1 to 65535")
    return Endpoint(scheme, host, int(port) if port else found.port or None)


def _host_and_port(text: str) -> tuple[str, str]:
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, port.lstrip(":")
    if text.count(":") > 1:  # an address of IPv6
        return text, ""
    host, _, port = text.partition(":")
    return host, port


async def check_files(found: Connection, *files: str | None) -> None:
    """
    Check that the files that a connection names can be read.

    :raises SourceMisconfigured: one cannot, or it is what is in a file.
    """
    for file in files:
        if not file:
            continue
        if "\n" in file or is_pem(file):  # not told: it may be a private key
            raise misconfigured(found, "has the content of a file where the name of one is needed")
        try:
            await asyncio.to_thread(Path(file).read_bytes)
        except (OSError, ValueError) as error:
            said = error if len(file) < _LONGEST_PATH else getattr(error, "strerror", "") or type(error).__name__
            raise SourceMisconfigured(
                f"the connection {found.conn_id!r}: a file that it names cannot be used: {said}"
            ) from None


async def context(
    found: Connection, authorities: str | None, certificate: str | None, key: str | None, *, verify: bool = True
) -> ssl.SSLContext:
    """
    Return what `tls` returns, made in a thread.

    :raises SourceMisconfigured: a file, or what is in it, cannot be used.
    """
    if key and not certificate:
        raise misconfigured(found, "names a key, and no certificate that it is of")
    await check_files(found, *(part for part in (authorities, certificate, key) if not is_pem(part)))
    try:
        return await asyncio.to_thread(tls, authorities, certificate, key, verify)
    except (OSError, ValueError) as error:  # of which ssl.SSLError is a kind
        raise misconfigured(found, f"has a certificate or a key that cannot be used: {error}") from error


def tls(authorities: str | None, certificate: str | None, key: str | None, verify: bool = True) -> ssl.SSLContext:
    """
    Return a context for TLS; it reads files, so not in the event loop.

    In the place of a file may be what is in it.

    :param authorities: a file of those that are trusted; None is the system's.
    :param certificate: the client's own, if it is to have one, and ``key`` its key, if that is in another file.
    :param verify: whether the server's certificate is checked, and its name.
    """
    if is_pem(authorities):
        context = ssl.create_default_context(cadata=authorities)
    else:
        context = ssl.create_default_context(cafile=authorities)
    if certificate:
        with _file(certificate) as chain, _file(key) as private:
            context.load_cert_chain(chain or "", private)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def is_pem(part: str | None) -> bool:
    """Whether it is not the name of a file, but what is in one."""
    return part is not None and part.lstrip().startswith(_PEM)


@contextlib.contextmanager
def _file(part: str | None) -> Iterator[str | None]:
    if part is None or not is_pem(part):
        yield part
        return
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # which nobody else may read
        file.write(part)
        file.flush()
        yield file.name
