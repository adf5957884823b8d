"""
The connection types that no other provider brings, as Airflow's page of connections wants them.

Airflow has a class for each type. Here it is only a name for the form: a listener reads the connection itself.
"""

from __future__ import annotations

from airflow.sdk.bases.hook import BaseHook


class NatsHook(BaseHook):
    """A connection to NATS."""

    conn_name_attr = "nats_conn_id"
    default_conn_name = "nats_default"
    conn_type = "nats"
    hook_name = "NATS"


class AmqpHook(BaseHook):
    """A connection to RabbitMQ."""

    conn_name_attr = "rabbitmq_conn_id"
    default_conn_name = "rabbitmq_default"
    conn_type = "amqp"
    hook_name = "RabbitMQ (AMQP)"
