"""
What Airflow's database knows of the waits: which are open, which are stuck, how one of them came along.

Functions over an SQLAlchemy session, for the page, the command line and the metrics. They read the inbox's tables
and Airflow's own; of what is at a source (an acknowledgement, a queue's length) they know nothing.
"""

from __future__ import annotations

from airflow_events.waits.detail import Detail, Step, Try, show
from airflow_events.waits.forgetting import Forgotten, forget
from airflow_events.waits.kept import Kept, drop, kept
from airflow_events.waits.listing import Counted, Order, Page, Stage, Summary, count, find
from airflow_events.waits.starting import Start, lags, starts

__all__ = [
    "Counted",
    "Detail",
    "Forgotten",
    "Kept",
    "Order",
    "Page",
    "Stage",
    "Start",
    "Step",
    "Summary",
    "Try",
    "count",
    "drop",
    "find",
    "forget",
    "kept",
    "show",
    "starts",
    "lags",
]
