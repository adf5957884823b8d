"""The DAGs of ``benchmarks/kafka_starts.py``: one is started by Airflow's own watcher of a topic, one by ours."""

from __future__ import annotations

from airflow.providers.common.messaging.triggers.msg_queue import MessageQueueTrigger
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, AssetWatcher
from airflow_events import start_on
from airflow_events.listeners.kafka import KafkaListener

ABOUT = {"max_active_runs": 2000, "max_active_tasks": 2000}

trigger = MessageQueueTrigger(
    scheme="kafka",
    topics=["asset_watcher"],
    kafka_config_id="asset_watcher",
    apply_function="take_message.take",
    poll_interval=1,
)
messages = Asset("asset_watcher", watchers=[AssetWatcher("kafka", trigger)])

with DAG("asset_watcher", schedule=[messages], **ABOUT):
    EmptyOperator(task_id="done")

with DAG("start_on", schedule=start_on(KafkaListener, "start_on", group="start_on"), **ABOUT):
    EmptyOperator(task_id="done")
