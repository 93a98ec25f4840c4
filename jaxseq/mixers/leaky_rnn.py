"""A recurrent network whose units forget at rates of their own."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer
from ..layers.projection import fan_in_projection
from ..layers.recurrent_cell import recurrent
from ..shapes import Array, Float, Int, accumulator, check_width, typed

LEAKS = ("inside", "outside")


class LeakyRNNState(NamedTuple):
    hidden: Float[Array, "B D"]


def leaky_cell(
    W: Float[Array, "D D"], tau: Float[Array, "D"], leak: str, state: LeakyRNNState, x: Float[Array, "B D"]
) -> LeakyRNNState:
    """One token, whose x is W_in x_t + b; units do not feed themselves, so their own memory is τ's alone."""
    h, rate = state.hidden, 1 / jnp.maximum(tau, 1)[None]
    drive = x + h @ (W * (1 - jnp.eye(len(W), dtype=W.dtype)))
    if leak == "inside":
        return LeakyRNNState(jax.nn.leaky_relu((1 - rate) * h + rate * drive))
    return LeakyRNNState((1 - rate) * h + rate * jax.nn.leaky_relu(drive))


class LeakyRNN(Mixer):
    """A leaky network with a trained time constant a unit (arXiv 2309.12927, section 2).

        h_t = φ((1 − 1/τ) ⊙ h_{t-1} + (W h_{t-1} + W_in x_t + b) / τ)        `leak` "inside"
        h_t = (1 − 1/τ) ⊙ h_{t-1} + φ(W h_{t-1} + W_in x_t + b) / τ          "outside"
        y_t = h_t

    φ is a leaky ReLU of slope 0.01; τ, in tokens, starts uniform in [1, 2] and counts as 1 where it is less; the
    diagonal of W counts as zero. The recurrence is not linear: `impl="parallel"` solves it by Newton iterations, with
    the whole `jacobian` or its diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    leak: str = "inside"
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        check_width(x, self.d_model, "LeakyRNN")
        if self.leak not in LEAKS:
            raise ValueError(f"leak={self.leak!r}; LeakyRNN takes {' or '.join(map(repr, LEAKS))}.")
        state = self.start(x) if state is None else state
        inputs = fan_in_projection(self.d_model, "in_proj", self, self.d_model)(x)
        one_to_two = lambda key, shape, dtype: 1 + jax.random.uniform(key, shape, dtype)
        tau = self.param("tau", one_to_two, (self.d_model,), self.param_dtype)
        square = (self.d_model, self.d_model)
        W = self.param("recurrent_kernel", symmetric_uniform(self.d_model**-0.5), square, self.param_dtype)
        W, tau = (a.astype(accumulator(a.dtype)) for a in (W, tau))
        cell = lambda state, x: leaky_cell(W, tau, self.leak, state, x)
        states, final = recurrent(self, cell, inputs, state, segment_ids)
        return states.hidden.astype(x.dtype if self.dtype is None else self.dtype), final

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LeakyRNNState:
        return LeakyRNNState(jnp.zeros((batch_size, self.d_model), accumulator(dtype)))
