"""Questions about the last N bits of a sequence: their parity, and whether the first of them comes again."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int
from .draws import require


def parity_of_last(bits: Float[Array, "B T"], count: int) -> Int[Array, "B"]:
    """The sum of the last `count` bits, modulo 2.

    Raises:
      ValueError: `count` is below 2, or above T.
    """
    return jnp.sum(_last(bits, count), axis=1).astype(jnp.int32) % 2


def matches_last(bits: Float[Array, "B T"], count: int) -> Int[Array, "B"]:
    """1 where the first of the last `count` bits equals the last one: a delayed match.

    Raises:
      ValueError: `count` is below 2, or above T.
    """
    last = _last(bits, count)
    return (last[:, 0] == last[:, -1]).astype(jnp.int32)


def parity_bits(key: Array, *, num_examples: int, length: int) -> Float[Array, "B T"]:
    """Bits for `parity_of_last` (arXiv 2309.12927, section 2): each sequence has a rate of ones of its own, in [0, 1].

    Raises:
      ValueError: a number is below 1.
    """
    require("parity_bits", {}, num_examples=num_examples, length=length)
    k_rate, k_bits = jax.random.split(key)
    rate = jax.random.uniform(k_rate, (num_examples, 1))
    return jax.random.bernoulli(k_bits, rate, (num_examples, length)).astype(jnp.float32)


def match_bits(key: Array, *, num_examples: int, length: int) -> Float[Array, "B T"]:
    """Fair bits, for `matches_last`.

    Raises:
      ValueError: a number is below 1.
    """
    require("match_bits", {}, num_examples=num_examples, length=length)
    return jax.random.bernoulli(key, 0.5, (num_examples, length)).astype(jnp.float32)


def _last(bits, count: int):
    if not 2 <= count <= bits.shape[1]:
        raise ValueError(f"count={count}; of {bits.shape[1]} bits it is the last 2 or more.")
    return bits[:, -count:]
