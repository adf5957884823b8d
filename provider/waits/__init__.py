"""
What Airflow's database knows of the waits: which are open, which are stuck, how one of them came along.

Functions over an SQLAlchemy session, for the page and the command line. They read Airflow's own tables and
nothing else; of what is at a source (a claim, a queue's length) they know nothing.
"""

from __future__ import annotations

from airflow_events.waits.detail import Detail, Step, Try, show
from airflow_events.waits.forgetting import Forgotten, forget
from airflow_events.waits.listing import Counted, Order, Page, Stage, Summary, count, find

__all__ = [
    "Counted",
    "Detail",
    "Forgotten",
    "Order",
    "Page",
    "Stage",
    "Step",
    "Summary",
    "Try",
    "count",
    "find",
    "forget",
    "show",
]
