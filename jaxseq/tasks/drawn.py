"""Examples of a task to train and to test on."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Batch = dict[str, np.ndarray]


def drawn_anew(
    task: Callable[..., tuple[Any, Any]], seed: int, batch_size: int, test_size: int
) -> tuple[Callable[[int], Batch], Batch]:
    """`(step -> batch, test)`, each `inputs` and `labels` of `task(key, num_examples=…)`.

    Batches are of the seed and the step alone, so that a run goes on as if it had not stopped.
    """
    draw = jax.jit(task, static_argnames="num_examples")
    named = lambda key, count: dict(
        zip(("inputs", "labels"), map(np.asarray, draw(key, num_examples=count)), strict=True)
    )
    train_key, test_key = jax.random.split(jax.random.key(seed))
    return lambda step: named(jax.random.fold_in(train_key, step), batch_size), named(test_key, test_size)
