"""How far a function is from convex."""

from collections.abc import Callable

import jax

from ..shapes import Array, Float


def convexity_gap(
    function: Callable[[Array], Array],
    x: Float[Array, "N ..."],
    other: Float[Array, "N ..."],
    share: Float[Array, "N"],
) -> Float[jax.Array, "N ..."]:
    """λ f(x) + (1 − λ) f(x') − f(λ x + (1 − λ) x') of N pairs of inputs and their shares λ, for each output.

    A convex function has none below zero, but for rounding.

    Raises:
      ValueError: the shapes disagree.
    """
    if x.shape != other.shape or share.shape != x.shape[:1]:
        raise ValueError(f"x has shape {x.shape}, other {other.shape} and share {share.shape}: N …, the same, and N.")

    def between(a, b):
        of = share.reshape(-1, *[1] * (a.ndim - 1))
        return of * a + (1 - of) * b

    return between(function(x), function(other)) - function(between(x, other))
