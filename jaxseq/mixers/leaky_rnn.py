"""A recurrent network whose units forget at rates of their own."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer
from ..layers.projection import fan_in_projection
from ..layers.recurrent_cell import recurrent
from ..shapes import Array, Float, Int, accumulator, typed

LEAKS = ("inside", "outside")


class LeakyRNNState(NamedTuple):
    hidden: Float[Array, "B D"]


def leaky_cell(
    W: Float[Array, "D D"],
    tau: Float[Array, "D"],
    leak: str,
    state: LeakyRNNState,
    x: Float[Array, "B D"],
    *,
    slope: float = 0.01,
    self_connected: bool = False,
) -> LeakyRNNState:
    """One token, whose x is W_in x_t + b; unless told, units do not feed themselves: their own memory is τ's alone."""
    h, rate = state.hidden, 1 / jnp.maximum(tau, 1)[None]
    phi = lambda z: jax.nn.leaky_relu(z, slope)
    drive = x + h @ (W if self_connected else W * (1 - jnp.eye(len(W), dtype=W.dtype)))
    if leak == "inside":
        return LeakyRNNState(phi((1 - rate) * h + rate * drive))
    return LeakyRNNState((1 - rate) * h + rate * phi(drive))


class LeakyRNN(Mixer):
    """A leaky network with a trained time constant a unit (arXiv 2309.12927, section 2).

        h_t = φ((1 − 1/τ) ⊙ h_{t-1} + (W h_{t-1} + W_in x_t + b) / τ)        `leak` "inside"
        h_t = (1 − 1/τ) ⊙ h_{t-1} + φ(W h_{t-1} + W_in x_t + b) / τ          "outside"
        y_t = h_t

    φ is a leaky ReLU of `slope`; τ, in tokens, starts uniform in [1, 2], is learned, and counts as 1 where it is less,
    or is `fixed_tau`; the diagonal of W counts as zero unless `self_connected`. W starts as `recurrent_init` says,
    uniform where None. The networks of low rank of arXiv 2310.08513 have `slope=0.0`, `fixed_tau=1.0`,
    `self_connected=True` and `recurrent_init=low_rank(normal(1.25 / sqrt(d_model)), rank)`.

    The recurrence is not linear: `impl="parallel"` solves it by Newton iterations, with the whole `jacobian` or its
    diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    leak: str = "inside"
    slope: float = 0.01
    fixed_tau: float | None = None
    self_connected: bool = False
    recurrent_init: Callable | None = None
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        if self.leak not in LEAKS:
            raise ValueError(f"leak={self.leak!r}; LeakyRNN takes {' or '.join(map(repr, LEAKS))}.")
        if not 0 <= self.slope <= 1:
            raise ValueError(f"slope={self.slope}; LeakyRNN takes 0 to 1.")
        if self.fixed_tau is not None and not 1 <= self.fixed_tau < np.inf:
            raise ValueError(f"fixed_tau={self.fixed_tau}; LeakyRNN takes a number from 1 on, or None.")
        inputs = fan_in_projection(self.d_model, "in_proj", self, self.d_model)(x)
        one_to_two = lambda key, shape, dtype: 1 + jax.random.uniform(key, shape, dtype)
        learned = lambda: self.param("tau", one_to_two, (self.d_model,), self.param_dtype)
        square = (self.d_model, self.d_model)
        start = symmetric_uniform(self.d_model**-0.5) if self.recurrent_init is None else self.recurrent_init
        W = self.param("recurrent_kernel", start, square, self.param_dtype)
        W = W.astype(accumulator(W.dtype))
        tau = learned().astype(W.dtype) if self.fixed_tau is None else jnp.full(self.d_model, self.fixed_tau, W.dtype)
        cell = partial(leaky_cell, W, tau, self.leak, slope=self.slope, self_connected=self.self_connected)
        states, final = recurrent(self, cell, inputs, state, segment_ids)
        return states.hidden.astype(x.dtype if self.dtype is None else self.dtype), final

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LeakyRNNState:
        return LeakyRNNState(jnp.zeros((batch_size, self.d_model), accumulator(dtype)))
