from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import airflow
import airflow_events
import jsonschema
import pytest
from airflow_events import settings
from airflow_events.provider_info import OPTIONS, get_provider_info


def test_the_provider_info_is_valid_against_airflows_schema():
    schema = json.loads((Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_every_module_that_it_names_is_there():
    info = get_provider_info()
    integrations = {integration["integration-name"] for integration in info["integrations"]}
    for section in ("operators", "triggers", "hooks"):
        for entry in info[section]:
            assert entry["integration-name"] in integrations
            for module in entry["python-modules"]:
                importlib.import_module(module)


def test_airflow_finds_the_provider_and_its_version():
    [entry] = [
        entry
        for entry in importlib.metadata.entry_points(group="apache_airflow_provider")
        if entry.value.startswith("airflow_events")
    ]
    assert entry.load() is get_provider_info
    assert importlib.metadata.version("airflow-provider-events") == airflow_events.__version__


def test_every_option_can_be_read_and_is_documented(monkeypatch):
    for name, option in OPTIONS.items():
        assert option["description"]
        assert getattr(settings, name)() not in (None, "") or name in (
            "callback_secret",
            "inbox_secret",
            "inbox_ca",
        )
    monkeypatch.setenv("AIRFLOW__EVENTS__COMMIT_TIMEOUT", "7")
    assert settings.commit_timeout() == 7


@pytest.mark.parametrize(
    ("option", "value", "found", "what"),
    [
        ("memory", "7d", 604800, "number"),
        ("commit_timeout", "nan", 120, "number"),
        ("http_match_interval", "-1", 2, "number"),
        ("inbox_max_body", "64MB", 67108864, "whole number"),
        ("hosts", "4.0", 4, "whole number"),
    ],
)
def test_a_number_that_is_none_is_named_and_its_default_is_used(option, value, found, what, monkeypatch, caplog):
    monkeypatch.setenv(f"AIRFLOW__EVENTS__{option.upper()}", value)
    settings._tell.cache_clear()
    assert getattr(settings, option)() == getattr(settings, option)() == found
    said = f"[events] {option} is '{value}', and has to be a {what}, 0 or more; its default {found} is used"
    assert caplog.messages == [said]
    with pytest.raises(ValueError, match=re.escape(said.partition(";")[0])):
        settings.check(option)


@pytest.mark.parametrize("value", ["inf", "1e300"])
def test_what_is_for_ever_can_be_counted_from_now(value, monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__MEMORY", value)
    assert datetime.now(timezone.utc) - timedelta(seconds=settings.memory()) > datetime(
        1980, 1, 1, tzinfo=timezone.utc
    )


def test_a_secret_from_a_command_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("AIRFLOW__EVENTS__INBOX_SECRET_CMD", "echo of-the-command")
    monkeypatch.delenv("AIRFLOW__EVENTS__INBOX_SECRET", raising=False)
    assert settings.inbox_secret() == "of-the-command"


def test_every_option_says_with_which_version_it_came():
    version = tuple(int(part) for part in airflow_events.__version__.split("."))
    for name, option in OPTIONS.items():
        added = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", option["version_added"])
        assert added, name
        assert tuple(int(part) for part in added.groups()) <= version, name


def test_the_face_imports_neither_operators_nor_clients_before_they_are_asked_for():
    code = "import airflow_events, sys; print(sorted(m for m in sys.modules if m.startswith('airflow')))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert modules.strip() == "['airflow_events', 'airflow_events.provider_info']"


def test_a_listener_is_named_without_importing_its_client():
    code = "import airflow_events.listeners.directory, sys; print('watchfiles' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")
