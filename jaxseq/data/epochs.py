"""The order in which examples are trained on."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64


def epoch_rows(
    count: int, batch_size: int, seed: int, *, of: str = "examples"
) -> Callable[[int], Int64[np.ndarray, " B"]]:
    """`step -> rows` of `count`, a function of the step alone: each epoch in an order of its own, whole batches.

    `of` is what the rows are of, for the message.

    Raises:
      ValueError: `batch_size` is below 1, or there are fewer rows than one batch takes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; choose 1 or more.")
    if batch_size > count:
        raise ValueError(f"batch_size={batch_size} is more than the {count} {of} there are.")

    def rows(step: int) -> np.ndarray:
        epoch, place = divmod(step, count // batch_size)
        order = np.random.default_rng((seed, epoch)).permutation(count)
        return order[place * batch_size : (place + 1) * batch_size]

    return rows
