"""What ``benchmarks/compare.py`` measures, part by part; this module imports nothing but Python's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What a part measured, as JSON keeps it.
Rows = list[dict[str, Any]]


@dataclass
class Stage:
    """What a part measures in: a running Airflow, its database, the brokers that the parts asked for."""

    airflow: Any
    postgres: Any
    brokers: dict[str, Any]
    options: argparse.Namespace


@dataclass
class Part:
    """
    One table.

    :param table: makes Markdown of what ``measure`` returned.
    :param dags: that must be there.
    :param brokers: modules of tests/sources, and the class in each, that must run.
    :param plot: what the plot shows that stands above the table; None if there is none.
    """

    measure: Callable[[Stage], Rows]
    table: Callable[[Rows], str]
    dags: tuple[str, ...] = ()
    brokers: tuple[tuple[str, str], ...] = ()
    plot: str | None = None
