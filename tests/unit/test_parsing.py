"""What parsing a DAG file again and again leaves in Airflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import airflow_events.example_dags
import pytest

TESTS = Path(__file__).parents[1]
PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.models.serialized_dag import SerializedDagModel
from airflow.serialization.serialized_objects import DagSerialization

found = []
for folder in sys.argv[1:]:
    bag = DagBag(dag_folder=folder, collect_dags=True)
    assert not bag.import_errors, bag.import_errors
    serialized = {dag_id: DagSerialization.to_dict(dag) for dag_id, dag in sorted(bag.dags.items())}
    hashes = {dag_id: SerializedDagModel.hash(data) for dag_id, data in serialized.items()}
    found.append([folder, hashes, any("pickle" in json.dumps(data) for data in serialized.values())])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("parses", [3, pytest.param(20, marks=pytest.mark.release)])
def test_fresh_parses_leave_one_version_of_each_dag(parses):
    folders = [str(TESTS / "dags"), str(Path(airflow_events.example_dags.__file__).parent)]

    def parse(number):
        path = os.pathsep.join([str(TESTS / "plugins"), *folders])
        done = subprocess.run(
            [sys.executable, "-c", PARSE, *folders],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]),
                "PYTHONHASHSEED": str(number),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        versions = set(pool.map(parse, range(parses)))
    assert len(versions) == 1
    # Both have listeners of a DAG file, which stand there as pickles: the same at each parse.
    found = json.loads(versions.pop())
    assert [(folder, pickled) for folder, _, pickled in found] == [(folder, True) for folder in folders]
    assert all(len(hashes) >= 3 for _, hashes, _ in found)
