"""How a nonlinear cell becomes the body of a mixer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..ops.nonlinear_recurrence import Cell, nonlinear_recurrence
from ..shapes import accumulator
from .initialisers import drawn_wide


def recurrent(module: Any, cell: Cell, xs, state, segment_ids):
    """`nonlinear_recurrence` by the module's `impl`, `jacobian` and `block_size`.

    Inputs and states are in at least float32. What Newton's iterations did is sown into "intermediates".
    """
    xs = jax.tree.map(lambda x: x.astype(accumulator(x.dtype)), xs)
    states, final, done = nonlinear_recurrence(
        cell, xs, state, segment_ids=segment_ids, impl=module.impl, jacobian=module.jacobian,
        block_size=module.block_size, report=True,
    )  # fmt: skip
    if module.impl == "parallel":
        module.sow("intermediates", "newton", done)
    return states, final


def recurrent_kernel(module: nn.Module, name: str, width: int, gates: int):
    """`width gates·width`, each gate's part orthogonal."""

    def initialise(key, shape, dtype=jnp.float32):
        keys = jax.random.split(key, gates)
        return jnp.concatenate(
            [drawn_wide(nn.initializers.orthogonal())(k, (width, width), dtype) for k in keys], axis=1
        )

    kernel = module.param(name, initialise, (width, gates * width), module.param_dtype)  # type: ignore[attr-defined]
    return kernel.astype(accumulator(kernel.dtype))
