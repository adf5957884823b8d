"""The wheel in a real Airflow, before anything waits."""

from __future__ import annotations

import airflow_events
from airflow_events.provider_info import OPTIONS


def test_airflow_lists_the_provider_and_its_settings(terminal):
    providers = terminal("providers", "list", "--output", "plain")
    [line] = [line for line in providers.splitlines() if line.startswith("airflow-provider-events")]
    assert line.split()[-1] == airflow_events.__version__
    settings = terminal("config", "list", "--section", "events")
    assert all(option in settings for option in OPTIONS)


def test_the_example_dags_are_read_without_an_error(airflow):
    assert airflow.api("GET", "/importErrors")["import_errors"] == []
