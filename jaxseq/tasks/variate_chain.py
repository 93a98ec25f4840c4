"""A chain of variates, each of which does next what the one before it did: all there is to know stands beside it."""

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Float
from .draws import require


def variate_chain(
    key: Array,
    *,
    num_examples: int,
    length: int = 64,
    num_variates: int = 8,
    delay: int = 1,
    carry: float = 0.95,
    noise: float = 0.3,
) -> Float[Array, "N T V"]:
    """The first of V variates is white noise, and any other what the one before it was `delay` steps ago.

        x_0(t) = ε        x_v(t) = carry x_{v−1}(t − delay) + noise ε        ε standard normal

    Who sees all variates up to a step can know the next of all but the first to a mean squared error of noise². No
    variate tells anything of itself: its variance, about 1, is what a model of one at a time has left.

    Raises:
      ValueError: a number is too small.
    """
    sizes = dict(num_examples=num_examples, length=length, num_variates=num_variates, delay=delay)
    require("variate_chain", {}, **sizes)
    before = delay * (num_variates - 1)  # what the last variate still is to show of the first
    steps = jax.random.normal(key, (num_variates, num_examples, before + length))

    def follow(ahead, ε):
        late = jnp.pad(ahead, ((0, 0), (delay, 0)))[:, : ahead.shape[1]]
        x = carry * late + noise * ε
        return x, x

    _, rest = lax.scan(follow, steps[0], steps[1:])
    return jnp.concatenate([steps[:1], rest])[:, :, before:].transpose(1, 2, 0)
