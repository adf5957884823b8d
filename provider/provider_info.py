"""
What Airflow's provider manager is told about this package, the ``[events]`` options among it.

Airflow reads it while it sets up its configuration, so nothing of Airflow may be imported here.
"""

from __future__ import annotations

from typing import Any

VERSION = "0.1.0"

SECTION = "events"

OPTIONS: dict[str, dict[str, Any]] = {
    "pickled_listeners": {
        "description": (
            "Whether listeners that the triggerer cannot import (those defined in a DAG file, or in a "
            "module beside it) may travel to it as a pickle. If False, a DAG that needs one fails at "
            "parse time, and the triggerer refuses to unpickle."
        ),
        "type": "boolean",
        "default": "True",
    },
    "commit_timeout": {
        "description": (
            "For how long, in seconds, a failing commit (event_checkpointed) is tried again, with "
            "growing pauses, before the try of the task fails. The event stays recorded, and the next "
            "try goes on from there."
        ),
        "type": "float",
        "default": "120",
    },
    "commit_memory": {
        "description": (
            "For how many seconds a source that would forget an event once it is committed (a broker) keeps "
            "which wait committed it. It is needed while a wait whose commit is not noted in Airflow may "
            "still be tried again."
        ),
        "type": "float",
        "default": "604800",
    },
    "unreachable_timeout": {
        "description": (
            "For how long, in seconds, a source that cannot be reached is tried again before the tries of "
            "the waits on it fail."
        ),
        "type": "float",
        "default": "600",
    },
    "callback_secret": {
        "description": (
            "With what callback addresses are signed; the same for API servers, workers and triggerers. Empty "
            "means [api] secret_key."
        ),
        "type": "string",
        "sensitive": True,
        "default": "",
    },
    "http_keep": {
        "description": (
            "For how many seconds an event that is sent to a key is kept for a wait that has not begun, and an "
            "idempotency key is remembered, unless the sender gives a ttl."
        ),
        "type": "float",
        "default": "604800",
    },
    "http_match_interval": {
        "description": "How often, in seconds, an API server looks whether a wait has begun for a kept event.",
        "type": "float",
        "default": "2",
    },
    "http_max_body": {
        "description": "How many bytes the body of an HTTP event may have at most.",
        "type": "integer",
        "default": "262144",
    },
    "directory_root": {
        "description": (
            "What relative paths given to DirectoryListener and DirectoryWatchListener are relative to. "
            "Empty means AIRFLOW_HOME."
        ),
        "type": "string",
        "default": "",
    },
    "directory_rescan_interval": {
        "description": (
            "How often, in seconds, a watched directory is looked at even though the file system reported "
            "nothing. Where the file system cannot report (a network mount), this is the polling interval."
        ),
        "type": "float",
        "default": "10",
    },
    "directory_claim_timeout": {
        "description": (
            "After how many seconds a file that a wait has claimed and not committed is given to others. "
            "A wait that still lives loses nothing by it: its commit is refused, and it waits on."
        ),
        "type": "float",
        "default": "86400",
    },
}

_INTEGRATION = "Events"


def get_provider_info() -> dict[str, Any]:
    """Describe the provider, after Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-events",
        "name": "Events",
        "description": "Wait for an event from outside, exactly once, without a worker sitting there.",
        "integrations": [{"integration-name": _INTEGRATION, "tags": ["software"]}],
        "operators": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "airflow_events.operators.wait_for_event",
                    "airflow_events.operators.wait_for_events",
                ],
            }
        ],
        "triggers": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": ["airflow_events.triggers.event", "airflow_events.triggers.events"],
            }
        ],
        # The plugin is an entry point of the package instead: Airflow loads plugins that stand here only with
        # [core] lazy_discover_providers = False.
        "cli": ["airflow_events.cli.definition.get_events_cli_commands"],
        "config": {
            SECTION: {
                "description": "Settings of airflow-provider-events.",
                "options": {
                    name: {"version_added": VERSION, "example": None, **option} for name, option in OPTIONS.items()
                },
            }
        },
    }
