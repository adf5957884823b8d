"""DAGs that run as they stand."""
