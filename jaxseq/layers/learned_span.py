"""Lengths that are learned between bounds."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float


@jax.custom_vjp
def bounded(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x clipped to [0, 1]. At a bound and beyond it, gradient descent may move x inwards and not further out.

    A plain clip has no gradient there: what reached a bound, or starts at it, would stay.
    """
    return jnp.clip(x, 0, 1)


def _inwards(x, gradient):
    outwards = ((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0))
    return (jnp.where(outwards, 0, gradient),)


bounded.defvjp(lambda x: (jnp.clip(x, 0, 1), x), _inwards)
