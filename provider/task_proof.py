"""
How an API server knows which task sends it an event, without a password.

Code of a task never sees the token that Airflow gives the task: its supervisor keeps that. But what the task
writes into its state store goes there with that token, and Airflow's execution API lets no other task write there.
So a task writes the digest of a proof, which is random, and shows the proof to the API server, which reads the
digest.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

STATE = "airflow_events.sender"
"""The key in the task's state store."""


def new() -> str:
    """Return a proof that nobody can guess."""
    return secrets.token_urlsafe(32)


def digest(proof: str) -> str:
    """Return what the task's state store has of a proof."""
    return hashlib.sha256(proof.encode()).hexdigest()


def is_of(proof: str, stored: object) -> bool:
    """Whether a proof is the one of which this is stored."""
    return isinstance(stored, str) and hmac.compare_digest(digest(proof).encode(), stored.encode())
