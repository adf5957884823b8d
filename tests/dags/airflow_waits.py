"""The DAGs of the tests of waits for what happens in Airflow itself."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, task
from airflow_events import wait_for_event
from airflow_events.listeners.airflow import AssetListener, DagRunListener, TaskListener

SOON = timedelta(seconds=1)
ORDERS = Asset("airflow_waits_orders")


@task(retries=3, retry_delay=SOON)
def gather(*events):
    return list(events)


with DAG("airflow_loader", schedule=None, catchup=False, params={"fails": False}):

    @task(outlets=[ORDERS])
    def publish(params=None, outlet_events=None):
        if params["fails"]:
            raise RuntimeError("as it was told")
        outlet_events[ORDERS].extra = {"rows": 17}

    publish()

with DAG("airflow_waits", schedule=None, catchup=False):

    def wait(task_id, listener, *args, **kwargs):
        of_task = kwargs.pop("of_task", {})
        return wait_for_event.override(task_id=task_id, retry_delay=SOON, **of_task)(listener, *args, **kwargs)

    gather(
        wait("run", DagRunListener, "airflow_loader"),
        wait("task", TaskListener, "airflow_loader", "publish"),
        wait("asset", AssetListener, ORDERS.name, of_task={"inlets": [ORDERS]}),
        wait("failed", DagRunListener, "airflow_loader", state="failed", since="{{ dag_run.run_after }}"),
    )
