"""The form of the tables over time."""
