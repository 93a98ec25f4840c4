"""How well a model predicts each token."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer

from ..train import cross_entropy


class TokenNats:
    """−log p of every target, 0 where it is negative, by `logits(params, inputs, key) → B T V`.

    One program reads `batch_size` rows at a time.

    Raises:
      ValueError: batch_size < 1.
    """

    def __init__(self, logits: Callable[..., Any], batch_size: int = 16):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; TokenNats takes 1 or more.")

        def nats(params, inputs, targets, key):
            return jax.vmap(jax.vmap(lambda *token: cross_entropy(*token)[0]))(logits(params, inputs, key), targets)

        self._nats, self._batch_size = jax.jit(nats), batch_size

    def __call__(
        self, params, inputs: Integer[np.ndarray, "N T"], targets: Integer[np.ndarray, "N T"], key=None
    ) -> Float[np.ndarray, "N T"]:
        """The key, that of 0 when None, is folded with the number of the batch: each draws its own.

        Raises:
          ValueError: there are no rows, or the shapes differ.
        """
        if len(inputs) == 0 or inputs.shape != targets.shape:
            raise ValueError(f"inputs has shape {inputs.shape} and targets {targets.shape}; they agree, and have rows.")
        key = jax.random.key(0) if key is None else key
        size, count = self._batch_size, len(inputs)
        batches = range(-(-count // size))
        # The last batch is as large as the others: one program serves all.
        inputs, targets = (np.resize(x, (len(batches) * size, x.shape[1])).astype(np.int32) for x in (inputs, targets))
        rows = lambda x, batch: x[batch * size : (batch + 1) * size]
        parts = [self._nats(params, rows(inputs, b), rows(targets, b), jax.random.fold_in(key, b)) for b in batches]
        return np.concatenate(parts)[:count].astype(np.float64)
