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

bag = DagBag(dag_folder=sys.argv[1], collect_dags=True)
assert not bag.import_errors, bag.import_errors
serialized = {dag_id: DagSerialization.to_dict(dag) for dag_id, dag in sorted(bag.dags.items())}
print(json.dumps({d: SerializedDagModel.hash(data) for d, data in serialized.items()}))
print(any("pickle" in json.dumps(data) for data in serialized.values()))
"""


@pytest.mark.parametrize("folder", [TESTS / "dags", Path(airflow_events.example_dags.__file__).parent], ids=str)
def test_fresh_parses_leave_one_version_of_each_dag(folder):
    def parse(number):
        done = subprocess.run(
            [sys.executable, "-c", PARSE, str(folder)],
            env={**os.environ, "PYTHONPATH": f"{TESTS / 'plugins'}:{folder}", "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        hashes, pickled = done.stdout.strip().splitlines()[-2:]
        assert pickled == "False"
        return hashes

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        versions = set(pool.map(parse, range(8)))
    assert len(versions) == 1
    assert len(json.loads(versions.pop())) >= 3
