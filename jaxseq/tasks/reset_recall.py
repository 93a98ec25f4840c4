"""Recall of pairs that a reset makes void: how a memory that fades differs from one that can be cleared."""

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Int


def vocabulary(num_keys: int, num_values: int) -> int:
    """Tokens of `reset_recall`: pairs (key, value), then queries of a key, then the reset."""
    return num_keys * num_values + num_keys + 1


def reset_recall(
    key: Array, *, num_examples: int, length: int = 64, num_keys: int = 8, num_values: int = 8, reset: float = 1 / 24
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: pairs of a random map, queries of keys seen since the map was last drawn anew.

    A token is the reset, with probability `reset`, after which all keys have other values; or it is of a random key:
    its query, with probability ½ if the key has been seen since, else the pair. The label of a query is the value, of
    all else −100.

    Raises:
      ValueError: a number is below 1, or `reset` is outside [0, 1].
    """
    sizes = dict(num_examples=num_examples, length=length, num_keys=num_keys, num_values=num_values)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; reset_recall takes 1 or more.")
    if not 0 <= reset <= 1:
        raise ValueError(f"reset={reset}; reset_recall takes a probability from 0 to 1.")
    pairs, last = num_keys * num_values, vocabulary(num_keys, num_values) - 1

    def step(carry, key):
        values, seen = carry
        keys = jax.random.split(key, 4)
        which = jax.random.randint(keys[0], (), 0, num_keys)
        again = jax.random.uniform(keys[1]) < reset
        query = seen[which] & (jax.random.uniform(keys[2]) < 0.5) & ~again
        token = jnp.where(again, last, jnp.where(query, pairs + which, which * num_values + values[which]))
        label = jnp.where(query, values[which], -100)
        drawn = jax.random.randint(keys[3], values.shape, 0, num_values)
        carry = jnp.where(again, drawn, values), jnp.where(again, False, seen.at[which].set(True))
        return carry, (token, label)

    def example(key):
        first, *steps = jax.random.split(key, 1 + length)
        start = jax.random.randint(first, (num_keys,), 0, num_values), jnp.zeros(num_keys, bool)
        return lax.scan(step, start, jnp.stack(steps))[1]

    inputs, labels = jax.vmap(example)(jax.random.split(key, num_examples))
    return inputs.astype(jnp.int32), labels.astype(jnp.int32)
