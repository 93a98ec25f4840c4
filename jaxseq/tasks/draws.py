"""What the tasks share: draws without replacement, and the checks of their sizes."""

from numbers import Integral

import jax
import jax.numpy as jnp

from ..shapes import Array, Bool, Float, Int

#: The label where nothing is asked.
IGNORED = -100
#: Rows that are drawn at a time.
ROWS = 1024


def distinct(key: Array, log_weights: Float[Array, "M"], shape: tuple[int, ...]) -> Int[Array, "*S"]:
    """Indices in [0, M), drawn along the last axis of `shape` one after the other without replacement.

    The next is i with probability proportional to exp(log_weights_i) among those left: the largest of log weights +
    Gumbel noise (Gumbel top-k, arXiv 1903.06059). More than `ROWS` rows are drawn `ROWS` at a time, each from a key of
    its own, since a row takes memory for all M.
    """
    *batch, count = shape
    if len(batch) == 1 and batch[0] > ROWS:
        row = lambda key: distinct(key, log_weights, (count,))
        return jax.lax.map(row, jax.random.split(key, batch[0]), batch_size=ROWS)
    noise = jax.random.gumbel(key, (*batch, log_weights.size), log_weights.dtype)
    return jax.lax.top_k(noise + jnp.expand_dims(log_weights, range(len(batch))), count)[1].astype(jnp.int32)


def integers(key: Array, shape: tuple[int, ...], low: int, high: int) -> Int[Array, "*S"]:
    """Uniform in [low, high), int32 whatever JAX's default is."""
    return jax.random.randint(key, shape, low, high, jnp.int32)


def require(task: str, least: dict[str, int], **sizes: int) -> None:
    """Refuse the first of the sizes that is no whole number from its least on, 1 where `least` does not name it."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < least.get(name, 1):
            raise ValueError(f"{name}={size!r}; {task} takes {least.get(name, 1)} or more, whole numbers.")


def first_of(same: Bool[Array, "N P P"]) -> Int[Array, "N P"]:
    """For each of P pairs the first that has its key: where a random map is drawn, one value for each key."""
    return same.argmax(axis=-1).astype(jnp.int32)
