"""Waits that share a trigger."""

from __future__ import annotations

from airflow.sdk import DAG
from airflow_events import wait_for_event
from airflow_events.listeners.directory import DirectoryWatchListener
from airflow_events.listeners.redis import RedisWatchListener

with DAG("hosted", schedule=None, catchup=False, params={"base": "", "of": ""}):
    for number in range(6):
        wait_for_event.override(task_id=f"wait_{number}", retries=1, retry_delay=1)(
            DirectoryWatchListener, "{{ params.base }}", pattern=f"{{{{ params.of }}}}-{number}"
        )
    # What its poll raises fails it alone.
    wait_for_event.override(task_id="fails", retries=0)(
        DirectoryWatchListener, "{{ params.base }}", settle="{{ params.of }}"
    )


# They rest until their message is there.
with DAG("log", schedule=None, catchup=False, params={"stream": ""}):
    for number in range(6):
        wait_for_event.override(task_id=f"wait_{number}", retries=1, retry_delay=1)(
            RedisWatchListener, "{{ params.stream }}", match={"n": number}, field="data", redis_conn_id="log"
        )
