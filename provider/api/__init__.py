"""Events over HTTP: what runs in Airflow's API server."""
