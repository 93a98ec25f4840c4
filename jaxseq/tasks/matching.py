"""Sums that come to nothing: which tokens have a partner, or two, with which they add up to zero."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Int
from .draws import require


def match_sums(
    key: Array, *, num_examples: int, length: int = 12, modulus: int = 101, order: int = 3
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """Numbers 0 … M − 1, and for each whether it has partners with which it adds up to a multiple of M.

        order 2: y_i = [∃ j: x_i + x_j ≡ 0]        order 3: y_i = [∃ j, l: x_i + x_j + x_l ≡ 0]        (mod M)

    Match2 and Match3 of arXiv 2306.02896: one layer of softmax attention solves the first, and the second only with a
    width that grows with T. Tokens may be partners of themselves, and come twice. Numbers are uniform: about half of
    the labels are 1 where T (T + 1) / 2 is 0.7 M for triples, or T is for pairs.

    Raises:
      ValueError: a number is below 1, or the order is neither 2 nor 3.
    """
    require("match_sums", {}, num_examples=num_examples, length=length, modulus=modulus)
    if order not in (2, 3):
        raise ValueError(f"order={order}; match_sums takes 2 for pairs or 3 for triples.")
    x = jax.random.randint(key, (num_examples, length), 0, modulus)
    return x, jax.vmap(lambda row: has_partners(row, modulus, order))(x).astype(jnp.int32)


def has_partners(x, modulus: int, order: int):
    """Whether what is missing to zero is among the numbers, or among the sums of two."""
    others = x if order == 2 else (x[:, None] + x[None]).reshape(-1) % modulus
    present = jnp.zeros(modulus, bool).at[others].set(True)
    return present[-x % modulus]
