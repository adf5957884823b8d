"""Copies of a run, in Airflow's own tables: many open waits, without the time that Airflow takes to start them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

from parts.processes import connect

# Runs that are copied by one statement: what joins a host is to be seen soon after the moment that it notes.
AT_ONCE = 1000
# Who has begun a copied wait, until a host begins it again.
NOBODY = "nobody"


def copy_rows(
    connection: Any, table: str, copies: str, where: str, order: str, on: str = "true", **changes: str
) -> None:
    """
    Copy rows of a table.

    :param copies: what to select from, once for each copy; a row is ``one``, and its number in ``order`` ``nth``.
    :param on: which row belongs to which copy.
    :param changes: an SQL expression for each column that is another one in a copy.
    """
    query = (
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = %s AND is_generated = 'NEVER'"
    )
    columns = [name for [name] in connection.execute(query, (table,))]
    assert changes.keys() <= set(columns), f"{table} has {columns}"
    names = ", ".join(f'"{name}"' for name in columns)
    values = ", ".join(changes.get(name, f'one."{name}"') for name in columns)
    connection.execute(
        f"INSERT INTO {table} ({names}) SELECT {values} FROM {copies}, "
        f"(SELECT *, row_number() OVER (ORDER BY {order}) - 1 AS nth FROM {table} WHERE {where}) AS one WHERE {on}"
    )


def copy_run(airflow: Any, run: Any, count: int, *, hosted: bool = True) -> list[Any]:
    """
    Copy a run whose waits are parked or hosted, with all that is kept of them, and return the copies.

    Each is a run of its own: its id stands wherever the original's does, also in what is encrypted, and in the key
    under which events are sent to it. Hosts find those of theirs as they find any that have joined.

    :param hosted: False if no host is to find them before they `join`.
    """
    from airflow_events.listeners.http import address_of
    from cryptography.fernet import Fernet

    # As Airflow encrypts the arguments of triggers.
    fernet = Fernet(airflow.environment["AIRFLOW__CORE__FERNET_KEY"])
    copies = [dataclasses.replace(run, run_id=f"{run.run_id}-{number}") for number in range(count)]
    ours = f"dag_id = '{run.dag_id}' AND run_id = '{run.run_id}'"
    with connect(airflow.database) as connection:
        kept = connection.execute(
            "SELECT task_id, parked, address IS NOT NULL FROM task_instance "
            f"LEFT JOIN event_wait USING (dag_id, run_id, task_id, map_index) WHERE {ours}"
        ).fetchall()
        kept = [(task, parked and fernet.decrypt(parked.encode()), has_key) for task, parked, has_key in kept]
        connection.execute(
            "CREATE TEMPORARY TABLE kept (copy text, task text, ti uuid, parked text, address bytea)"
        )
        of_task = {"on": "one.task_id = kept.task", "run_id": "kept.copy"}
        for first in range(0, count, AT_ONCE):
            connection.execute("TRUNCATE kept")
            with connection.cursor().copy("COPY kept FROM STDIN") as rows:
                for copy in copies[first : first + AT_ONCE]:
                    for task, parked, has_key in kept:
                        key = bytes.fromhex(address_of(f"{copy.run_id}-{task}")) if has_key else None
                        of_copy = parked and parked.replace(run.run_id.encode(), copy.run_id.encode())
                        again = of_copy and fernet.encrypt(of_copy).decode()
                        rows.write_row((copy.run_id, task, uuid.uuid4(), again, key))
            runs = "(SELECT DISTINCT copy FROM kept) AS kept"
            copy_rows(connection, "dag_run", runs, ours, "id", id="nextval('dag_run_id_seq')", run_id="kept.copy")
            copy_rows(connection, "task_instance", "kept", ours, "id", **of_task, id="kept.ti", trigger_id="NULL")
            copy_rows(
                connection, "event_wait", "kept", ours, "task_id", **of_task,
                call=f"replace(one.call, '{run.run_id}', kept.copy)",
                address="kept.address",
                holder=f"'{NOBODY}'",
                parked="kept.parked",
                parked_try="kept.ti::text",
                wake=f"replace(replace(one.wake, '{run.run_id}', kept.copy), one.parked_try, kept.ti::text)",
                hosted_at="CASE WHEN one.hosted_at IS NOT NULL THEN now() END",
                **({} if hosted else {"host": "NULL"}),
            )  # fmt: skip
        connection.execute("VACUUM ANALYZE")
    return copies


def holders(airflow: Any, dag_id: str) -> set[str]:
    """Return the processes that poll for a DAG's hosted waits; of a copy that no host has begun, `NOBODY`."""
    query = "SELECT DISTINCT holder FROM event_wait WHERE dag_id = %s AND host IS NOT NULL"
    with connect(airflow.database) as connection:
        return {holder for (holder,) in connection.execute(query, (dag_id,))}


def polled_for(airflow: Any) -> dict[bytes, int]:
    """Return for how many waits each host polls, as it says."""
    with connect(airflow.database) as connection:
        return dict(connection.execute("SELECT host, coalesce(waits, 0) FROM event_host").fetchall())


def join(connection: Any, dag_id: str, copies: Sequence[Any]) -> None:
    """Let copies of a wait, of which no host has known, join the host of those of the DAG that wait now."""
    connection.execute(
        "UPDATE event_wait SET hosted_at = now(), host = (SELECT host FROM event_wait WHERE dag_id = %s AND "
        "host IS NOT NULL LIMIT 1) WHERE dag_id = %s AND run_id = ANY(%s)",
        (dag_id, dag_id, [copy.run_id for copy in copies]),
    )
