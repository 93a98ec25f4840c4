"""How well a model predicts each token."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer

from ..train import cross_entropy


def token_nats(
    logits: Callable,
    params: Any,
    inputs: Integer[np.ndarray, "N T"],
    targets: Integer[np.ndarray, "N T"],
    *,
    batch_size: int = 16,
    key: jax.Array | None = None,
) -> Float[np.ndarray, "N T"]:
    """−log p of every target by `logits(params, inputs, key) → B T V`, `batch_size` rows at a time.

    The key, that of 0 when None, is folded with the number of the batch: what is random differs between batches.

    Raises:
      ValueError: batch_size < 1, there are no rows, or the shapes differ.
    """
    if batch_size < 1 or len(inputs) == 0:
        raise ValueError(f"batch_size={batch_size} and {len(inputs)} rows; token_nats takes 1 or more.")
    if inputs.shape != targets.shape:
        raise ValueError(f"inputs has shape {inputs.shape} and targets {targets.shape}; they have to agree.")

    @jax.jit
    def score(params, inputs, targets, key):
        return jax.vmap(jax.vmap(lambda *token: cross_entropy(*token)[0]))(logits(params, inputs, key), targets)

    key = jax.random.key(0) if key is None else key
    starts = range(0, len(inputs), batch_size)
    # The last batch is as large as the others: one program serves all.
    filled = lambda x: np.resize(x, (len(starts) * batch_size, x.shape[1])).astype(np.int32)
    inputs, targets, count = filled(inputs), filled(targets), len(inputs)
    parts = [
        score(params, inputs[s : s + batch_size], targets[s : s + batch_size], jax.random.fold_in(key, s // batch_size))
        for s in starts
    ]
    return np.concatenate(parts)[:count].astype(np.float64)
