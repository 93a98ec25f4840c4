"""How well a language model predicts text."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from ..data import with_begin
from ..train import cross_entropy, over_time, shard_batch


class BitsPerByte:
    """Nats and bits per byte over windows `N T` of bytes that each start from nothing, `batch_size` at a time.

    `mesh` is the one the model is trained on; one program serves all calls.
    """

    def __init__(self, model, batch_size: int, mesh: Mesh):
        def nats(params, rows, key):
            logits = model.apply(params, rows["inputs"])
            return jax.vmap(lambda *row: cross_entropy(*row)[0])(logits, rows["targets"]), {}

        self._nats, self._batch_size, self._mesh = jax.jit(over_time(nats, mesh)), batch_size, mesh

    def __call__(self, params, targets: np.ndarray) -> dict[str, float]:
        nats: list[float] = []
        for start in range(0, len(targets), self._batch_size):
            # The last batch is filled up with rows from its start, so that its shape is that of the others.
            rows = np.resize(targets[start : start + self._batch_size], (self._batch_size, targets.shape[1]))
            batch = shard_batch({"inputs": with_begin(rows), "targets": rows.astype(np.int32)}, self._mesh)
            nats += self._nats(params, batch, None)[0].tolist()
        mean = float(np.mean(nats[: len(targets)]))
        return {"loss": mean, "bits_per_byte": mean / math.log(2)}
