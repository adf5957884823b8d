"""DAGs whose runs events start; each has a folder of its own below AIRFLOW_HOME."""

from __future__ import annotations

import os
import time
from pathlib import Path

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Asset, AssetWatcher, task
from airflow_events import event_trigger, start_on
from probes import GatedDirectory

HOME = Path(os.environ["AIRFLOW_HOME"], "starts")

with DAG("started", schedule=start_on(GatedDirectory, str(HOME / "started")), max_active_runs=100):
    EmptyOperator(task_id="done")


@task
def wait_for_the_test(folder):
    while not (HOME / folder / "go").exists():
        time.sleep(0.2)


with DAG("started_slowly", schedule=start_on(GatedDirectory, str(HOME / "started_slowly")), max_active_runs=2):
    wait_for_the_test("started_slowly")

drops = Asset("drops", watchers=[AssetWatcher("drops", event_trigger(GatedDirectory, str(HOME / "by_asset")))])

with DAG("by_asset", schedule=drops):
    EmptyOperator(task_id="done")

in_batches = start_on.override(batch=4, within=3)(GatedDirectory, str(HOME / "in_batches"))

with DAG("in_batches", schedule=in_batches, max_active_runs=100):
    EmptyOperator(task_id="done")

by_key = start_on.override(key="size", match="!ends_with(name, '.tmp')", logical_date="modified")

with DAG("by_key", schedule=by_key(GatedDirectory, str(HOME / "by_key")), max_active_runs=100):
    wait_for_the_test("by_key")
