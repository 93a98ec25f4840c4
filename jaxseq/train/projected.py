"""Training inside a set."""

from collections.abc import Callable
from typing import Any

import jax
import optax


def projected(optimizer: optax.GradientTransformation, project: Callable[[Any], Any]) -> optax.GradientTransformation:
    """`optimizer`, after each step of which the parameters are `project(params)`: projected gradient descent.

    The parameters it starts from are the caller's to project.
    """

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("params=None; a projected optimizer is given the parameters.")
        updates, state = optimizer.update(grads, state, params)
        inside = project(optax.apply_updates(params, updates))
        return jax.tree.map(lambda new, old: new - old, inside, params), state

    return optax.GradientTransformation(optimizer.init, update)
