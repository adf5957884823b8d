"""How many examples Hypothesis draws, and whether the same ones each time."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def of_examples(most: int, *, repeatable: bool = True) -> settings:
    """
    Return the settings of a search whose outcome does not depend on how fast the machine is.

    :param repeatable: whether it draws the same examples each time, and reports the first that fails as it is.
    """
    return settings(
        max_examples=most,
        deadline=None,
        derandomize=repeatable,
        database=None,
        phases=[Phase.explicit, Phase.generate] if repeatable else list(Phase),
        suppress_health_check=list(HealthCheck),
    )
