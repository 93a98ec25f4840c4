"""Metrics of more rows than fit into one batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def mean_metrics(
    loss: Callable, params: Any, read: Callable[[np.ndarray], Any], count: int, *, size: int = 100
) -> dict[str, Any]:
    """Means over all of `count` rows, `size` of them at a time: `read(rows)` is a batch.

    `loss(params, batch, key) -> (scalar, metrics)` is as for `fit`, its metrics means over the batch; the key is None.
    The mean of an array, such as a metric of several models, is one. The same `loss`, given again, compiles no more.

    Raises:
      ValueError: `count` or `size` is below 1.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count={count} and size={size} must be at least 1.")
    score = jax.jit(loss)
    parts = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    found = jax.device_get([score(params, read(rows), None)[1] for rows in parts])
    weights = [len(rows) for rows in parts]  # the last may be shorter
    return {name: np.average([metrics[name] for metrics in found], axis=0, weights=weights) for name in found[0]}
