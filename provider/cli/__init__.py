"""``airflow events``: what the page does, in the terminal."""
