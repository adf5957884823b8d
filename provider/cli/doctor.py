"""``airflow events doctor``: whether a triggerer here gets to the inbox, and what to do if it does not."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from airflow.sdk.configuration import conf
from airflow.utils.cli import suppress_logs_and_warning
from airflow.utils.providers_configuration_loader import providers_configuration_loaded
from airflow.utils.session import create_session
from airflow_events import inbox_token, settings
from airflow_events.errors import InboxKeyMissing
from airflow_events.provider_info import OPTIONS, SECTION, VERSION
from airflow_events.triggers.inbox_http import detail, tls
from sqlalchemy.exc import SQLAlchemyError

_TIMEOUT = 10.0  # seconds

_WHERE = (
    "set [events] inbox_url to the address at which triggerers reach /events/inbox of the API server; empty, it "
    "follows from [core] execution_api_server_url or [api] base_url. An API server for the execution API alone "
    "(--apps execution) has no plugins, and so no inbox"
)


@dataclass(frozen=True)
class Finding:
    """
    What one look has shown.

    :param what: was looked at.
    :param advice: what to do; empty if nothing is wrong.
    """

    what: str
    said: str
    advice: str = ""


@suppress_logs_and_warning
@providers_configuration_loaded
def doctor(args: argparse.Namespace) -> None:
    """Say what was found; fail if something is wrong."""
    wrong = False
    for found in examine():
        wrong = wrong or bool(found.advice)
        print(f"{'WRONG' if found.advice else 'fine ':5}  {found.what:12}  {found.said}")
        if found.advice:
            print(f"{'':21}-> {found.advice}")
    if wrong:
        raise SystemExit(1)


def examine() -> Iterator[Finding]:
    """Look at everything that a triggerer needs in order to ask the inbox."""
    yield from options()
    yield key()
    yield signed_urls()
    yield tables()
    yield from server()


def options() -> Iterator[Finding]:
    """Look for settings that cannot be used."""
    for option in OPTIONS:
        try:
            settings.check(option)
        except Exception as error:  # of Airflow's configuration, too
            yield Finding("settings", str(error), "correct it in the section [events], or in the environment")


def key() -> Finding:
    """Look for something to sign with."""
    try:
        count = len(inbox_token.keys())
    except InboxKeyMissing as missing:
        return Finding("key", str(missing), "use the same on API servers, triggerers and workers that send events")
    if settings.inbox_secret():
        return Finding("key", "derived from [events] inbox_secret")
    others = f", and {count - 1} more accepted" if count > 1 else ""
    return Finding("key", f"derived from the first of [core] fernet_key{others}")


def signed_urls() -> Finding:
    """Look for something to sign addresses with, which not everybody needs."""
    for option, is_set in (
        ("[events] callback_secret", conf.get(SECTION, "callback_secret", fallback="")),
        ("[api] secret_key", settings.callback_secret()),
    ):
        if is_set:
            return Finding("signed URLs", f"signed with {option}")
    return Finding("signed URLs", "none: neither [events] callback_secret nor [api] secret_key is set")


def tables() -> Finding:
    """Look for the tables in Airflow's database."""
    from airflow_events.inbox.manager import InboxDBManager

    try:
        with create_session(scoped=False) as session:
            manager = InboxDBManager(session)
            found = manager.get_current_revision()
            script = manager.get_script_object()
    except SQLAlchemyError as error:
        said = " ".join(str(getattr(error, "orig", None) or error).split())
        return Finding("tables", f"the database cannot be reached: {said}", "see `airflow db check`")
    [wanted] = script.get_heads()
    known = {revision.revision for revision in script.walk_revisions()}
    if found == wanted:
        return Finding("tables", f"at revision {found}")
    if found is None:
        return Finding("tables", f"missing; revision {wanted} is required", "run `airflow db migrate`")
    if found in known:
        return Finding("tables", f"at revision {found}; revision {wanted} is required", "run `airflow db migrate`")
    return Finding(
        "tables",
        f"at revision {found}, which this package does not know; its own is {wanted}",
        f"install the airflow-provider-events that made them; here is {VERSION}",
    )


def server() -> Iterator[Finding]:
    """Look for the inbox in the API server, as the client of a triggerer does."""
    url = settings.inbox_url()
    try:
        where = httpx.URL(url)
        if not where.host:
            raise httpx.InvalidURL("there is no host in it")
        socket.getaddrinfo(where.host, where.port or where.scheme)
    except (httpx.InvalidURL, OSError, UnicodeError, OverflowError) as error:
        yield Finding("address", f"the host of {url} cannot be resolved: {error}", _WHERE)
        return
    try:
        headers = {"Authorization": f"Bearer {inbox_token.sign()}"}
    except InboxKeyMissing:
        headers = {}
    try:
        context = tls()
    except OSError as error:
        yield Finding("certificates", str(error), "set [events] inbox_ca to a file that can be read")
        return
    try:
        response = httpx.get(url, headers=headers, verify=context, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        said = f"{url} does not answer: {type(error).__name__}: {error}"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            advice = "set [events] inbox_ca to a file with the certificate of the CA that signed the server's"
        else:
            advice = f"is the API server up, and may this machine connect to it? If it is elsewhere, {_WHERE}"
        yield Finding("address", said, advice)
        return
    yield from _of(url, response)


def _of(url: str, response: httpx.Response) -> Iterator[Finding]:
    answered = f"{response.status_code} {detail(response)}".strip()
    if response.status_code == 401:
        yield Finding("address", f"{url} answers")
        yield Finding(
            "token",
            f"refused: {detail(response)}",
            "use the same [core] fernet_key (or [events] inbox_secret) here as there, and synchronize the clocks",
        )
        return
    if response.status_code == 503:
        yield Finding("address", f"{url} answers")
        yield Finding("API server", f"it answers {answered}", "do what it says; its log may have more")
        return
    try:
        there = response.json()
        version, of_tables = str(there["version"]), str(there["tables"])
    except (ValueError, KeyError, TypeError):
        yield Finding(
            "address",
            f"{url} answers, and not as the inbox does: {answered[:200]}",
            f"install airflow-provider-events {VERSION} where the API server is, and start it again; or {_WHERE}",
        )
        return
    yield Finding("address", f"{url} answers")
    yield Finding("token", "accepted")
    same = "" if version == VERSION else "install the same version on all components"
    yield Finding("versions", f"{VERSION} here, {version} in the API server", same)
    if not of_tables:
        yield Finding("its tables", "the API server finds none", "is its database the one that was migrated?")
