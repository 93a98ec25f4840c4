"""Long short-term memory."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer
from ..layers.projection import fan_in_projection
from ..layers.recurrent_cell import recurrent, recurrent_kernel
from ..shapes import Array, Float, Int, accumulator, typed


class LSTMState(NamedTuple):
    cell: Float[Array, "B D"]
    hidden: Float[Array, "B D"]


def lstm_cell(U: Float[Array, "D 4*D"], state: LSTMState, x: Float[Array, "B 4*D"]) -> LSTMState:
    """One token, whose x is W x_t + b, gates in the order i, f, g, o."""
    i, f, g, o = jnp.split(x + state.hidden @ U, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return LSTMState(cell, jax.nn.sigmoid(o) * jnp.tanh(cell))


class LSTM(Mixer):
    """A memory cell behind gates (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

        i, f, o = σ(W x_t + U h_{t-1} + b)        g = tanh(…)
        c_t = f ⊙ c_{t-1} + i ⊙ g        h_t = o ⊙ tanh(c_t)        y_t = h_t

    b starts uniform within ± D^-½, f's around `forget_bias`. The recurrence is not linear: `impl="parallel"` solves it
    by Newton iterations, with the whole `jacobian` or its diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    forget_bias: float = 1.0
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        inputs = fan_in_projection(4 * self.d_model, "in_proj", self, self.d_model, self._bias)(x)
        U = recurrent_kernel(self, "recurrent_kernel", self.d_model, 4)
        cell = lambda state, x: lstm_cell(U, state, x)
        states, final = recurrent(self, cell, inputs, state, segment_ids)
        return states.hidden.astype(x.dtype if self.dtype is None else self.dtype), final

    @nn.nowrap
    def _bias(self, key, shape, dtype=jnp.float32):
        within = symmetric_uniform(self.d_model**-0.5)(key, shape, dtype)
        return within.at[self.d_model : 2 * self.d_model].add(self.forget_bias)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LSTMState:
        zeros = lambda: jnp.zeros((batch_size, self.d_model), accumulator(dtype))
        return LSTMState(zeros(), zeros())
