"""
The project's long pauses that are no settings, short in the Airflow of the tests, which would only wait for them.

This is a plugin for the Airflow of the tests.
"""

from __future__ import annotations

from typing import Any

import wrapt


@wrapt.when_imported("airflow_events.api.gauges")
def count_more_often(module: Any) -> None:
    module._PAUSE = 1.0
