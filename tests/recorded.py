"""Outputs recorded from the authors' own code, beside the repository in `../shared/reference`, and how to meet them."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
recorded = pytest.mark.skipif(not REFERENCE.exists(), reason="the recorded outputs are not beside the repository")


@cache
def load(file, group=None):
    """The arrays of a file, or of one group of it."""
    if not REFERENCE.exists():
        return {}
    arrays = dict(np.load(REFERENCE / f"{file}.npz"))
    return arrays if group is None else {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith(f"{group}/")}


def groups(file, prefix):
    names = (
        []
        if not REFERENCE.exists()
        else {k.split("/")[0] for k in np.load(REFERENCE / f"{file}.npz").files if "/" in k}
    )
    return sorted(name for name in names if name.startswith(prefix)) or [prefix]


def assert_near(actual, expected, bound):
    """The measure of ssm.md: the largest error over the largest value, array by array."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()
        assert error <= bound, f"{jax.tree_util.keystr(path)}: error {error:.2e} exceeds {bound:.0e}"


def with_gradients(function, inputs, cotangents):
    """Values and the gradients of every input, jitted."""

    def both(inputs, cotangents):
        values, pull = jax.vjp(function, inputs)
        return values, pull(cotangents)[0]

    return jax.jit(both)(inputs, cotangents)
