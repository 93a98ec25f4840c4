"""The state of mixers that keep a matrix a head, behind short convolutions."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..shapes import Array, Float, accumulator
from .short_convolution import empty_convolutions


class MatrixState(NamedTuple):
    matrix: Float[Array, "B H K V"]
    conv: tuple[Float[Array, "B W-1 _"], ...]  # what the convolution of each projection still sees; empty without


def empty_matrix_state(
    module: nn.Module, batch_size: int, matrix: tuple[int, int, int], convolutions: tuple[int, ...], dtype
) -> MatrixState:
    """Zeros: a matrix H K V in at least float32, and the module's `convolved` inputs of these widths."""
    conv = empty_convolutions(module, batch_size, convolutions, dtype)
    return MatrixState(jnp.zeros((batch_size, *matrix), accumulator(dtype)), conv)
