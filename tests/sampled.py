"""Which parameters of a test run by default."""

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(chosen: Iterable[Any], every: Iterable[Any]) -> list[Any]:
    """All of `every`: the chosen ones by default, the others, which mostly go through the same lines, as slow tests."""
    chosen = list(chosen)
    unpacked = lambda value: value if isinstance(value, tuple) else (value,)
    return [pytest.param(*unpacked(value), marks=[pytest.mark.slow] * (value not in chosen)) for value in every]
