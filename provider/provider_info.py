"""
What Airflow's provider manager is told about this package, the ``[events]`` options among it.

Airflow reads it while it sets up its configuration, so nothing of Airflow may be imported here.
"""

from __future__ import annotations

from typing import Any

VERSION = "0.2.0"

SECTION = "events"

# ``version_added`` stands as text: the version that an option came with does not change with VERSION.
OPTIONS: dict[str, dict[str, Any]] = {
    "pickled_listeners": {
        "version_added": "0.1.0",
        "description": (
            "Whether listeners that the triggerer cannot import (those defined in a DAG file, or in a "
            "module beside it) may travel to it as a pickle. If False, a DAG that needs one fails at "
            "parse time, and the triggerer refuses to unpickle."
        ),
        "type": "boolean",
        "default": "True",
    },
    "commit_timeout": {
        "version_added": "0.1.0",
        "description": (
            "For how long, in seconds, a failing commit (event_checkpointed) is tried again, with "
            "growing pauses, before the try of the task fails. The event stays recorded, and the next "
            "try goes on from there."
        ),
        "type": "float",
        "default": "120",
    },
    "memory": {
        "version_added": "0.2.0",
        "description": (
            "For how many seconds the inbox remembers who has an event, after the event's source has confirmed "
            "that it has forgotten the event. Until a source has confirmed it, the inbox remembers."
        ),
        "type": "float",
        "default": "604800",
    },
    "migrate_on_start": {
        "version_added": "0.2.0",
        "description": (
            "Whether the API server migrates this package's tables in Airflow's database as it starts, where "
            "nobody can run `airflow db migrate`. It needs a database user that may create and alter tables. If "
            "False, an API server that finds them missing or old says so in its log."
        ),
        "type": "boolean",
        "default": "False",
    },
    "unreachable_timeout": {
        "version_added": "0.1.0",
        "description": (
            "For how long, in seconds, a source that cannot be reached is tried again before the tries of "
            "the waits on it fail."
        ),
        "type": "float",
        "default": "600",
    },
    "callback_secret": {
        "version_added": "0.1.0",
        "description": (
            "With what signed URLs are signed; the same for API servers, workers and triggerers. Empty means "
            "[api] secret_key."
        ),
        "type": "string",
        "sensitive": True,
        "default": "",
    },
    "http_keep": {
        "version_added": "0.1.0",
        "description": (
            "For how many seconds an event that is sent to a key is kept for a wait that has not begun, and an "
            "idempotency key is remembered, unless the sender gives a ttl. With 0 nothing is kept: an event that "
            "no wait takes is refused with 404."
        ),
        "type": "float",
        "default": "604800",
    },
    "http_most_kept_for_key": {
        "version_added": "0.2.0",
        "description": "How many events are kept for one key at most; more are refused with 429.",
        "type": "integer",
        "default": "1000",
    },
    "http_most_kept_for_sender": {
        "version_added": "0.2.0",
        "description": (
            "How many events of one sender (a user, a webhook or a task) are kept for all keys at most; more are "
            "refused with 429."
        ),
        "type": "integer",
        "default": "10000",
    },
    "http_most_kept": {
        "version_added": "0.2.0",
        "description": (
            "How many events are kept for all keys at most; more are refused with 429. An API server counts them "
            "every ten seconds, so that several of them may keep some more."
        ),
        "type": "integer",
        "default": "100000",
    },
    "hosts": {
        "version_added": "0.2.0",
        "description": (
            "How many triggers the waits of one listener share. More spread them over more triggerers; those that "
            "take messages from one queue share one. Triggerers read it; a wait stays with the host that it has "
            "joined."
        ),
        "type": "integer",
        "default": "4",
    },
    "http_match_interval": {
        "version_added": "0.1.0",
        "description": "How often, in seconds, an API server looks whether a wait has begun for a kept event.",
        "type": "float",
        "default": "2",
    },
    "airflow_look_interval": {
        "version_added": "0.2.0",
        "description": (
            "How often, in seconds, an API server looks for the DAG runs, tasks and asset events that waits of "
            "DagRunListener, TaskListener and AssetListener want. It looks less often where that takes long, and "
            "for nothing where there are no such waits."
        ),
        "type": "float",
        "default": "1",
    },
    "http_max_body": {
        "version_added": "0.1.0",
        "description": "How many bytes the body of an HTTP event may have at most.",
        "type": "integer",
        "default": "262144",
    },
    "send_from_tasks": {
        "version_added": "0.2.0",
        "description": (
            "Whether tasks may send events to the keys of waits, of any DAG, by their own authority "
            "(send_event, EventHook). API servers read it."
        ),
        "type": "boolean",
        "default": "True",
    },
    "inbox_url": {
        "version_added": "0.2.0",
        "description": (
            "The address at which triggerers, and tasks that send events, reach the inbox in the API server, as a "
            "whole: "
            "https://airflow.example.com/events/inbox. Empty means that it follows from "
            "[core] execution_api_server_url, and where that is not set from [api] base_url. Set it where the "
            "execution API has API servers of its own (--apps execution): plugins are not among these."
        ),
        "type": "string",
        "default": "",
    },
    "inbox_secret": {
        "version_added": "0.2.0",
        "description": (
            "With what triggerers sign their requests to the inbox; the same for API servers and triggerers. "
            "Empty means a key derived from [core] fernet_key."
        ),
        "type": "string",
        "sensitive": True,
        "default": "",
    },
    "inbox_ca": {
        "version_added": "0.2.0",
        "description": (
            "Path of a file with the certificates of the authorities that triggerers trust when they reach the "
            "inbox by https. Empty means [api] ssl_ca_file, and where that is not set those of the system."
        ),
        "type": "string",
        "default": "",
    },
    "inbox_max_body": {
        "version_added": "0.2.0",
        "description": "How many bytes one request of a triggerer to the inbox may have at most.",
        "type": "integer",
        "default": "67108864",
    },
    "directory_root": {
        "version_added": "0.1.0",
        "description": (
            "What relative paths given to DirectoryListener and DirectoryWatchListener are relative to. "
            "Empty means AIRFLOW_HOME."
        ),
        "type": "string",
        "default": "",
    },
    "directory_rescan_interval": {
        "version_added": "0.1.0",
        "description": (
            "How often, in seconds, a watched directory is looked at even though the file system reported "
            "nothing. Where the file system cannot report (a network mount), this is the polling interval."
        ),
        "type": "float",
        "default": "10",
    },
    "directory_claim_timeout": {
        "version_added": "0.1.0",
        "description": (
            "After how many seconds a file that a wait of version 0.1 had claimed and not committed is given to "
            "others. Later versions claim no files, and need this only after an upgrade from 0.1."
        ),
        "type": "float",
        "default": "86400",
    },
}

_INTEGRATION = "Events"

_Fields = dict[str, dict[str, Any]]


def _text(label: str, description: str = "", **schema: Any) -> dict[str, Any]:
    return _field(label, description, "string", **schema)


def _secret(label: str, description: str = "") -> dict[str, Any]:
    return _field(label, description, "string", format="password")


def _field(label: str, description: str, kind: str, **schema: Any) -> dict[str, Any]:
    said = {"description": description} if description else {}
    return {"label": label, **said, "schema": {"type": [kind, "null"], **schema}}


# The connection types that no provider of Airflow's brings: their names, hooks, and the extras that their forms
# ask for. Those of Kafka, Redis, PostgreSQL and AWS come with these providers, which our extras bring.
_NATS: _Fields = {
    "token": _secret("Token", "Or a password without a login."),
    "nkey_seed": _secret("NKey seed"),
    "credentials": _text("Credentials file", "Its path, on every triggerer and worker."),
    "tls": _field("TLS", "Also by a host tls://...", "boolean", default=False),
    "tls_ca": _text("Authorities for TLS", "The path of a PEM file; the system's if it is empty."),
    "tls_cert": _text("The client's certificate", "The path of a PEM file."),
    "tls_key": _text("The client's key", "The path of a PEM file, if it is not in the certificate's."),
    "tls_hostname": _text("Name in the server's certificate", "If it is not the host."),
    "tls_handshake_first": _field("TLS first", "As the server's handshake_first.", "boolean", default=False),
}
_AMQP: _Fields = {
    "ssl": _field("TLS", "The server's certificate and name are checked.", "boolean", default=False),
    "cafile": _text("Authorities for TLS", "The path of a PEM file; the system's if it is empty."),
    "certfile": _text("The client's certificate", "The path of a PEM file."),
    "keyfile": _text("The client's key", "The path of a PEM file, if it is not in the certificate's."),
    "ssl_verify": _field("Check the server's certificate", "", "boolean", default=True),
    "ssl_server_hostname": _text("Name in the server's certificate", "If it is not the host."),
    "heartbeat": _field("Heartbeat", "In seconds.", "integer", default=60, minimum=0),
    "auth": _text("Login by", "External: the client's certificate is the login.", enum=["plain", "external"]),
}
_CONNECTION_TYPES: list[dict[str, Any]] = [
    {
        "connection-type": "nats",
        "hook-class-name": "airflow_events.listeners.support.hooks.NatsHook",
        "hook-name": "NATS",
        "ui-field-behaviour": {
            "hidden-fields": ["schema"],
            "relabeling": {},
            "placeholders": {"host": "localhost, or a,b:4333, or tls://a", "port": "4222"},
        },
        "conn-fields": _NATS,
    },
    {
        "connection-type": "amqp",
        "hook-class-name": "airflow_events.listeners.support.hooks.AmqpHook",
        "hook-name": "RabbitMQ (AMQP)",
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {},
            "placeholders": {"host": "localhost", "port": "5672", "login": "guest", "schema": "/ (virtual host)"},
        },
        "conn-fields": _AMQP,
    },
]


def get_provider_info() -> dict[str, Any]:
    """Describe the provider, after Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-provider-events",
        "name": "Events",
        "description": "Wait for an event from outside, exactly once, without a worker sitting there.",
        "integrations": [
            {"integration-name": _INTEGRATION, "tags": ["software"]},
            {"integration-name": "NATS", "external-doc-url": "https://docs.nats.io/", "tags": ["software"]},
            {
                "integration-name": "RabbitMQ",
                "external-doc-url": "https://www.rabbitmq.com/docs",
                "tags": ["software"],
            },
        ],
        "operators": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "airflow_events.operators.send_event",
                    "airflow_events.operators.wait_for_event",
                    "airflow_events.operators.wait_for_events",
                ],
            }
        ],
        "triggers": [
            {
                "integration-name": _INTEGRATION,
                "python-modules": [
                    "airflow_events.triggers.event",
                    "airflow_events.triggers.events",
                    "airflow_events.triggers.starts",
                ],
            }
        ],
        "hooks": [
            {"integration-name": _INTEGRATION, "python-modules": ["airflow_events.operators.event_hook"]},
            *(
                {"integration-name": name, "python-modules": ["airflow_events.listeners.support.hooks"]}
                for name in ("NATS", "RabbitMQ")
            ),
        ],
        "connection-types": _CONNECTION_TYPES,
        # The plugin is an entry point of the package instead: Airflow loads plugins that stand here only with
        # [core] lazy_discover_providers = False.
        "cli": ["airflow_events.cli.definition.get_events_cli_commands"],
        "db-managers": ["airflow_events.inbox.manager.InboxDBManager"],
        "config": {
            SECTION: {
                "description": "Settings of airflow-provider-events.",
                "options": {name: {"example": None, **option} for name, option in OPTIONS.items()},
            }
        },
    }
