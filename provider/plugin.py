"""
What this package adds to Airflow's API server.

The plugin is an entry point of the package. Under ``plugins`` of the provider's description Airflow would not find
it, unless ``[core] lazy_discover_providers`` were off.
"""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin
from airflow_events.api.callback import callback_url

_PAGE = "events/page/"
_WAIT = "dag_id={DAG_ID}&run_id={RUN_ID}&task_id={TASK_ID}&map_index={MAP_INDEX}"


class _Apps:
    """The apps, made when Airflow's API server asks: every other component loads plugins, and needs none."""

    def __get__(self, plugin: object | None, owner: type) -> list[dict[str, Any]]:
        from airflow_events.api.app import create_app

        return [{"name": "events", "app": create_app(), "url_prefix": "/events"}]


class _Middlewares:
    """What starts and ends with an API server; apps that are mounted are not told of either."""

    def __get__(self, plugin: object | None, owner: type) -> list[dict[str, Any]]:
        from airflow_events.api.matcher import Matcher

        return [{"name": "events", "middleware": Matcher, "args": [], "kwargs": {}}]


class EventsPlugin(AirflowPlugin):
    """
    Mounts the app, shows the page, gives kept events to waits that begin, and signs addresses in templates.

    No Airflow listener in here: with one, no task of the deployment could end in the triggerer.
    """

    name = "airflow_events"
    macros = [callback_url]  # noqa: RUF012 (as Airflow declares it)
    fastapi_apps = _Apps()
    fastapi_root_middlewares = _Middlewares()
    # The addresses are relative, for an Airflow below a path of its own.
    external_views = [  # noqa: RUF012 (as in Airflow's own plugins)
        {
            "name": "Waits",
            "href": _PAGE,
            "destination": "nav",
            "category": "browse",
            "url_route": "event-waits",
            "icon": f"{_PAGE}icon.svg",
        },
        {
            "name": "Wait",
            "href": f"{_PAGE}?tab=1&{_WAIT}",
            "destination": "task_instance",
            "url_route": "event-wait",
            "icon": f"{_PAGE}icon.svg",
        },
    ]
