"""What the pictures of the page show: a shop that waits for files, payments, approvals and the morning."""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, task
from airflow_events import start_on, wait_for_event
from airflow_events.listeners.directory import DirectoryListener, DirectoryWatchListener
from airflow_events.listeners.http import HttpListener
from airflow_events.listeners.timer import TimerListener
from shop_listeners import LedgerListener


@task
def load(event):
    return event


def wait(task_id, **operator_arguments):
    return wait_for_event.override(task_id=task_id, **operator_arguments)


with DAG("shop_orders", schedule=None, catchup=False, params={"drops": "drops"}):
    order = wait("order_file", timeout=timedelta(hours=6))(
        DirectoryListener, "{{ params.drops }}", pattern="order-*.json", settle=0
    )
    load(order)

with DAG("shop_payments", schedule=None, catchup=False):
    load(wait("payment", retries=9)(LedgerListener, "EUR-001", above=100))

with DAG("shop_refunds", schedule=None, catchup=False, params={"refund": "R-2041"}):
    load(wait("approval", timeout=timedelta(days=2))(HttpListener, "refund-{{ params.refund }}"))

with DAG("shop_reports", schedule=None, catchup=False):
    wait("closing_time")(TimerListener, timedelta(hours=9))
    wait("exchange_rates_of_the_european_central_bank", timeout=timedelta(hours=1))(
        DirectoryWatchListener,
        "rates/european-central-bank/daily/reference-rates",
        pattern="eurofxref-daily-*.xml",
    )

with DAG(
    "shop_returns", schedule=start_on(DirectoryListener, "returns", settle=0), catchup=False, max_active_runs=2
):
    wait("inspection")(HttpListener, "return-{{ dag_run.conf.event.name }}")

invoices = start_on.override(match="ends_with(name, '.pdf')", key="name")(DirectoryListener, "invoices")

with DAG("shop_invoices", schedule=invoices, catchup=False, max_active_runs=8):
    EmptyOperator(task_id="pay")
