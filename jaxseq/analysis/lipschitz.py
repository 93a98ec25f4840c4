"""How far outputs move when inputs do."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..shapes import Array, Float


def local_lipschitz(function: Callable[[Array], Array], inputs: Float[Array, "N ..."]) -> Float[Array, "N"]:
    """The largest singular value of the derivative of `function` at each of N inputs, of which it takes one.

    It is how far the output moves over how far the input does, for small moves in the worst direction. The Lipschitz
    constant on a convex set is the largest of its points: of some points, a lower bound. Whole Jacobians, exact.

    Raises:
      ValueError: there are no inputs.
    """
    if len(inputs) == 0:
        raise ValueError(f"inputs has shape {inputs.shape}; local_lipschitz takes one or more.")

    def steepest(x):
        J = jax.jacrev(lambda x: jnp.ravel(function(x)))(x)
        return jnp.linalg.norm(J.reshape(len(J), -1), 2)

    return jax.lax.map(steepest, inputs)
