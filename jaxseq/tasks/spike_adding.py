"""Sums of two spoken digits, in little: patterns of spikes one after the other (SHD-Adding, arXiv 2306.16922)."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int
from .draws import integers, require


def spike_templates(key: Array, *, count: int = 5, length: int = 25, channels: int = 30) -> Float[Array, "K T C"]:
    """Probabilities of a spike, ½ u⁴ with u uniform: a pattern for each digit.

    Raises:
      ValueError: a number is below 1.
    """
    require("spike_templates", {}, count=count, length=length, channels=channels)
    return jax.random.uniform(key, (count, length, channels)) ** 4 / 2


def spike_adding(
    key: Array, templates: Float[Array, "K T C"], *, num_examples: int
) -> tuple[Float[Array, "N 2*T C"], Int[Array, "N"]]:
    """`(spikes, labels)`: two of the templates in turn, spikes drawn anew each time; the label is the sum of their
    numbers, from 0 to 2 (K − 1).

    Raises:
      ValueError: `num_examples` is below 1.
    """
    require("spike_adding", {}, num_examples=num_examples)
    k_digits, k_spikes = jax.random.split(key)
    digits = integers(k_digits, (num_examples, 2), 0, len(templates))
    rates = templates[digits].reshape(num_examples, -1, templates.shape[-1])
    spikes = jax.random.bernoulli(k_spikes, rates).astype(templates.dtype)
    return spikes, digits.sum(axis=1).astype(jnp.int32)
