"""What the doctor finds, and that it says what to do."""

from __future__ import annotations

import argparse
import socket

import pytest
import trustme
from airflow_events import inbox_token
from airflow_events.api import inbox_routes
from airflow_events.cli import doctor as module
from airflow_events.cli.definition import get_events_cli_commands
from airflow_events.cli.doctor import Finding, examine, key, options, server, signed_urls, tables
from airflow_events.provider_info import VERSION
from cryptography.fernet import Fernet
from sqlalchemy import text

FERNET = Fernet.generate_key().decode()


def found(findings):
    """What was found, by what was looked at; of what is wrong with the advice."""
    return {one.what: f"WRONG {one.said} -> {one.advice}" if one.advice else one.said for one in findings}


def test_all_is_well(api, database, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__CALLBACK_SECRET", "of signed URLs")
    head = database()
    url = f"{api().url}/events/inbox"
    assert found(examine()) == {
        "key": "derived from [events] inbox_secret",
        "signed URLs": "signed with [events] callback_secret",
        "tables": f"at revision {head}",
        "address": f"{url} answers",
        "token": "accepted",
        "versions": f"{VERSION} here, {VERSION} in the API server",
    }


def test_settings_that_cannot_be_used(monkeypatch):
    assert list(options()) == []
    monkeypatch.setenv("AIRFLOW__EVENTS__MEMORY", "7d")
    monkeypatch.setenv("AIRFLOW__EVENTS__MIGRATE_ON_START", "yes")
    memory, migrate = options()
    assert memory.said == "[events] memory is '7d', and has to be a number, 0 or more"
    assert '"migrate_on_start"' in migrate.said
    assert memory.advice == migrate.advice == "correct it in the section [events], or in the environment"


@pytest.mark.parametrize(
    ("fernet_key", "said"),
    [
        (FERNET, "derived from the first of [core] fernet_key"),
        (f"{FERNET},{FERNET}", "derived from the first of [core] fernet_key, and 1 more accepted"),
        ("", "WRONG requests to the inbox are signed with a key derived from [core] fernet_key, which is empty"),
    ],
    ids=["one", "two", "none"],
)
def test_the_key(secret, monkeypatch, fernet_key, said):
    secret("")
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", fernet_key)
    assert found([key()])["key"].startswith(said)
    assert FERNET not in str(key())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("of the API", "signed with [api] secret_key"),
        (None, "none: neither [events] callback_secret nor [api] secret_key is set"),
    ],
)
def test_the_secret_of_signed_urls(monkeypatch, key, said):
    monkeypatch.delenv("AIRFLOW__API__SECRET_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", key)
    assert found([signed_urls()]) == {"signed URLs": said}


def test_without_a_key_it_still_says_whether_the_server_answers(api, secret, monkeypatch):
    server_url = api().url
    secret("")
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "")
    findings = found(server())
    assert findings["address"] == f"{server_url}/events/inbox answers"
    assert findings["token"].startswith("WRONG refused: there is no token")


def version_of(session, version):
    session.execute(text("UPDATE alembic_version_events SET version_num = :version"), {"version": version})
    session.commit()


def test_the_tables(database, monkeypatch):
    from airflow import settings
    from alembic.script import ScriptDirectory

    assert found([tables()])["tables"].startswith("WRONG missing; revision")
    assert tables().advice == "run `airflow db migrate`"
    head = database()
    assert tables() == Finding("tables", f"at revision {head}")
    with settings.NonScopedSession() as session:
        version_of(session, "fff000fff000")
    assert "at revision fff000fff000, which this package does not know" in tables().said
    assert "install" in tables().advice
    with monkeypatch.context() as later, settings.NonScopedSession() as session:
        version_of(session, head)
        later.setattr(ScriptDirectory, "get_heads", lambda self: ["a later one"])
        assert tables() == Finding(
            "tables", f"at revision {head}; revision a later one is required", "run `airflow db migrate`"
        )


def test_the_database_is_away(monkeypatch):
    from airflow import settings
    from sqlalchemy import create_engine
    from sqlalchemy.orm import sessionmaker

    engine = create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none")
    monkeypatch.setattr(settings, "NonScopedSession", sessionmaker(engine))
    assert "the database cannot be reached" in tables().said
    assert len(tables().said.splitlines()) == 1
    assert "airflow db check" in tables().advice


@pytest.mark.parametrize(
    "url", ["http://nowhere.invalid:8080/events/inbox", "/events/inbox", "http://x:port/", "spam://localhost/"]
)
def test_an_address_that_leads_nowhere(secret, monkeypatch, url):
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_URL", url)
    [finding] = server()
    assert finding.what == "address"
    assert "cannot be resolved" in finding.said
    assert "[events] inbox_url" in finding.advice


def test_nobody_listens(secret, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_URL", f"http://127.0.0.1:{port}/events/inbox")
    [finding] = server()
    assert "does not answer: ConnectError" in finding.said
    assert "is the API server up" in finding.advice


def test_a_token_of_another_deployment(api, secret, monkeypatch):
    api()
    secret("of another deployment")
    token = inbox_token.sign()
    secret("the secret of the tests")
    monkeypatch.setattr(inbox_token, "sign", lambda: token)
    findings = found(server())
    assert "signed with another key" in findings["token"]
    assert "[core] fernet_key" in findings["token"]
    assert token not in str(findings)


@pytest.mark.parametrize(
    ("status", "body"),
    [(404, {"detail": "Not Found"}), (200, "<h1>log in</h1>"), (302, ""), (200, [])],
    ids=range(4),
)
def test_what_answers_is_not_the_inbox(api, status, body):
    there = api()
    there.refuse(status, body)
    [finding] = server()
    assert f"{there.url}/events/inbox answers, and not as the inbox does: {status}" in finding.said
    assert "install airflow-provider-events" in finding.advice
    assert "--apps execution" in finding.advice


def test_the_api_server_says_what_it_lacks(api):
    api().refuse(503, {"detail": "run `airflow db migrate`"})
    findings = found(server())
    assert findings["API server"].startswith("WRONG it answers 503 run `airflow db migrate`")


def test_another_version_and_another_database(api, database, monkeypatch):
    api()
    monkeypatch.setattr(inbox_routes, "VERSION", "0.0.1")
    findings = found(server())
    assert findings["versions"].startswith(f"WRONG {VERSION} here, 0.0.1 in the API server -> install the same")
    assert findings["its tables"].startswith("WRONG the API server finds none")


def test_certificates(api, monkeypatch, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    api(ssl_certfile=tmp_path / "server.pem", ssl_keyfile=tmp_path / "server.pem")
    [finding] = server()
    assert "CERTIFICATE_VERIFY_FAILED" in finding.said
    assert "[events] inbox_ca" in finding.advice
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_CA", str(tmp_path / "none.pem"))
    [finding] = server()
    assert finding.what == "certificates"
    assert "none.pem" in finding.said
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_CA", str(tmp_path / "ca.pem"))
    assert found(server())["address"].endswith("answers")


def run():
    [group] = get_events_cli_commands()
    [command] = [one for one in group.subcommands if one.name == "doctor"]
    command.func(argparse.Namespace(verbose=False))


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(module, "examine", lambda: [Finding("key", "derived")])
    run()
    assert capsys.readouterr().out == "fine   key           derived\n"
    monkeypatch.setattr(
        module, "examine", lambda: [Finding("tables", "not there", "make them"), Finding("key", "ok")]
    )
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "WRONG  tables        not there",
        "                     -> make them",
        "fine   key           ok",
    ]
