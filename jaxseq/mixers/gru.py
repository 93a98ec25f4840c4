"""The gated recurrent unit."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer
from ..layers.projection import fan_in_projection
from ..layers.recurrent_cell import recurrent, recurrent_kernel
from ..shapes import Array, Float, Int, accumulator, typed


class GRUState(NamedTuple):
    hidden: Float[Array, "B D"]


def gru_cell(U: Float[Array, "D 3*D"], c: Float[Array, "D"], state: GRUState, x: Float[Array, "B 3*D"]) -> GRUState:
    """One token, whose x is W x_t + b, gates in the order r, z, n."""
    h, width = state.hidden, len(c)
    r, z = jnp.split(jax.nn.sigmoid(x[:, : 2 * width] + h @ U[:, : 2 * width]), 2, axis=-1)
    n = jnp.tanh(x[:, 2 * width :] + r * (h @ U[:, 2 * width :] + c[None]))
    return GRUState((1 - z) * n + z * h)


class GRU(Mixer):
    """A state that a gate holds or renews (arXiv 1406.1078), reset after the product, as cuDNN has it.

        r, z = σ(W x_t + U h_{t-1} + b)        n = tanh(W_n x_t + b_n + r ⊙ (U_n h_{t-1} + c))
        h_t = (1 − z) ⊙ n + z ⊙ h_{t-1}        y_t = h_t

    The recurrence is not linear: `impl="parallel"` solves it by Newton iterations, with the whole `jacobian` or its
    diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        inputs = fan_in_projection(3 * self.d_model, "in_proj", self, self.d_model)(x)
        U = recurrent_kernel(self, "recurrent_kernel", self.d_model, 3)
        c = self.param("reset_bias", symmetric_uniform(self.d_model**-0.5), (self.d_model,), self.param_dtype)
        cell = lambda state, x: gru_cell(U, c.astype(U.dtype), state, x)
        states, final = recurrent(self, cell, inputs, state, segment_ids)
        return states.hidden.astype(x.dtype if self.dtype is None else self.dtype), final

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> GRUState:
        return GRUState(jnp.zeros((batch_size, self.d_model), accumulator(dtype)))
