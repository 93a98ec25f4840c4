"""What the layers of a model tell about themselves."""

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, Shaped


def sown(
    model: nn.Module, params, inputs: Shaped[np.ndarray, "N ..."], name: str, *, batch_size: int = 16
) -> Float[np.ndarray, " S"]:
    """All values that layers sow into "intermediates" under a name, in a row; none where no layer does.

    One program reads `batch_size` rows of the inputs at a time, another the rest of them.

    Raises:
      ValueError: batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; sown takes 1 or more.")

    @jax.jit
    def read(params, rows):
        _, collections = model.apply(params, rows, mutable=["intermediates"])
        leaves = jax.tree.leaves_with_path(collections)
        names = lambda path: [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return [leaf for path, leaf in leaves if names(path)[-1] == name]

    parts = (read(params, inputs[row : row + batch_size]) for row in range(0, len(inputs), batch_size))
    return np.concatenate([np.zeros(0, np.float32), *(np.ravel(leaf) for part in parts for leaf in part)])
