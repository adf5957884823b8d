"""
The clients by which listeners reach their sources: packages that are installed by an extra of this one.

A DAG file that names a listener is parsed again and again, by processes that never poll. So the module that the
listener is imported from imports no client: it asks for it here, and its methods import what needs it when they
run.
"""

from __future__ import annotations

import importlib.util


def needs(listener: str, extra: str, *packages: str) -> None:
    """
    Check that packages are installed, without importing them.

    :param listener: which needs them, as the error calls it: ``a Redis listener``.
    :param extra: of this package, by which they are installed.
    :param packages: their names in Python: top-level ones, since of others the parent is imported (of a provider
        that is Airflow).
    :raises ImportError: one of them is not there; it says what to install.
    """
    for package in packages:
        if not _is_there(package):
            raise ImportError(f"{listener} needs: pip install airflow-provider-events[{extra}]", name=package)


def _is_there(package: str) -> bool:
    try:
        found = importlib.util.find_spec(package)
    except ImportError:
        return False
    except ValueError:  # it is imported, by somebody who gave it no spec
        return True
    # A folder of that name beside the DAG files is a package too, one without an origin.
    return found is not None and found.origin is not None
