"""
Messages of an SQS queue: each run takes one, exactly once, and another task reads it.

On a machine without AWS, moto's server will do (``pip install "moto[sqs,server]" awscli``)::

    export AIRFLOW_CONN_AWS_DEFAULT='{"conn_type": "aws", "login": "any", "password": "any",
        "extra": {"region_name": "eu-central-1", "endpoint_url": "http://127.0.0.1:5000"}}'
    export AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_DEFAULT_REGION=eu-central-1
    export AWS_ENDPOINT_URL=http://127.0.0.1:5000
    moto_server -p 5000 &
    aws sqs create-queue --queue-name orders
    aws sqs send-message --queue-url $AWS_ENDPOINT_URL/123456789012/orders --message-body '{"order_id": 42}'
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import dag, task
from airflow_events import wait_for_event
from airflow_events.listeners.sqs import SqsListener


@dag(schedule=None, catchup=False, tags=["events"], params={"queue": "orders"})
def events_sqs():
    """Take one message, of which the body is JSON, from the queue ``orders``, or another by the run's conf."""
    order = wait_for_event.override(task_id="order", timeout=timedelta(hours=6))(SqsListener, "{{ params.queue }}")

    @task
    def read(event):
        return {"message": event["message_id"], "order": event["value"]}

    read(order)


events_sqs()
