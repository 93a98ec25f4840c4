"""The expressive leaky memory neuron."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer, above_zero
from ..layers.projection import fan_in_projection
from ..layers.recurrent_cell import recurrent
from ..ops.linear_recurrence import linear_recurrence
from ..shapes import Array, Float, Int, accumulator, typed

ROUTINGS = ("none", "interleaved", "random")
ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}


class ELMState(NamedTuple):
    trace: Float[Array, "B _"]  # version 1: of each synapse; 2: of each branch
    memory: Float[Array, "B M"]


class Affine(NamedTuple):
    """x W + b."""

    kernel: Float[Array, "N M"]
    bias: Float[Array, "M"]

    def of(self, x: Float[Array, "B N"]) -> Float[Array, "B M"]:
        return x @ self.kernel + self.bias[None]


def memory_cell(
    decay: Float[Array, "M"],
    share: Float[Array, "M"],
    hidden: Affine,
    update: Affine,
    activation: str,
    memory: Float[Array, "B M"],
    branches: Float[Array, "B N"],
) -> Float[Array, "B M"]:
    """One token: m ← κ m + share φ(MLP([b, κ m])), φ(z) = 1.7159 tanh(2 z / 3)."""
    kept = decay[None] * memory
    z = update.of(ACTIVATIONS[activation](hidden.of(jnp.concatenate([branches, kept], axis=-1))))
    return kept + share[None] * 1.7159 * jnp.tanh(z * 2 / 3)


class ELM(Mixer):
    """Leaky synapses that feed an MLP, which moves leaky memories of many time constants (arXiv 2306.16922).

        s_t = κ_s s_{t-1} + w ⊙ x_t        b_t = Σ s_t over each branch        version 1
        b_t = κ_s b_{t-1} + Σ w ⊙ x_t over each branch                         version 2
        m_t = κ_m m_{t-1} + λ (1 − κ_m) φ(MLP([b_t, κ_m m_{t-1}]))             version 1, in 2 1 − κ_m^λ for λ (1 − κ_m)
        y_t = W_y m_t + b_y

    κ = exp(−`step_size` / τ), in the units of τ. Weights w ≥ 0 start at ½, traces have τ = `trace_tau`, and the
    `num_memory` memories τ log-spaced from 1 to `max_tau`, learned if `learn_tau`. The MLP has one hidden layer of
    2 `num_memory`. Without `num_branches` every channel is a branch. With them `routing` says which channels a branch
    has: consecutive ones ("none"), `branch_size` neighbours of the two halves' channels in turn, in windows that
    may overlap ("interleaved", for excitatory and inhibitory halves), or `branch_size` drawn ones ("random",
    the same for all of one `d_model`).

    Traces are linear and memories are not: `impl="parallel"` solves these by Newton iterations, with the whole
    `jacobian` or its diagonal, in blocks of `block_size` tokens.
    """

    d_model: int
    num_memory: int = 100
    num_branches: int | None = None
    branch_size: int | None = None
    routing: str = "none"
    version: int = 2
    activation: str = "silu"
    max_tau: float = 500.0
    trace_tau: float = 5.0
    step_size: float = 1.0
    update_scale: float = 5.0
    learn_tau: bool = False
    jacobian: str = "full"
    block_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        branches, size = self._sizes()
        wide = accumulator(x.dtype)
        at, there = self._routes()
        w = nn.relu(self.param("synapses", nn.initializers.constant(0.5), (branches * size,), self.param_dtype))
        inputs = jnp.where(there, w, 0).astype(wide)[None, None] * x[..., at].astype(wide)
        summed = lambda a: a.reshape(*a.shape[:2], branches, size).sum(axis=-1)
        inputs = summed(inputs) if self.version == 2 else inputs
        decay = jnp.asarray(np.exp(-self.step_size / self.trace_tau), wide)
        traces, trace = linear_recurrence(
            jnp.full_like(inputs, decay), inputs, initial_state=state.trace, segment_ids=segment_ids
        )
        memory, last = recurrent(
            self, self._cell(branches), traces if self.version == 2 else summed(traces), state.memory, segment_ids
        )
        memory = memory.astype(x.dtype if self.dtype is None else self.dtype)
        y = fan_in_projection(self.d_model, "out_proj", self, self.num_memory)(memory)
        return y, ELMState(trace.astype(state.trace.dtype), last)

    def _cell(self, branches: int) -> Callable:
        M, (low, high) = self.num_memory, (1.0, self.max_tau)
        share = (np.geomspace(low, high, M) - low) / (high - low)
        share = np.clip(share, 1e-6, 1 - 1e-6)  # the logits of the ends are infinite
        logits = jnp.asarray(np.log(share / (1 - share)), self.param_dtype)
        rho = self.param("tau_logit", lambda key: logits)
        rho = rho if self.learn_tau else jax.lax.stop_gradient(rho)
        wide = lambda a: a.astype(accumulator(a.dtype))
        tau = low + (high - low) * jax.nn.sigmoid(wide(rho))
        decay = jnp.exp(-self.step_size / tau)
        scale = self.update_scale
        moved = scale * (1 - decay) if self.version == 1 else 1 - jnp.exp(-scale * self.step_size / tau)

        def affine(name, before, after):
            start = symmetric_uniform(before**-0.5)
            kernel = self.param(f"{name}_kernel", start, (before, after), self.param_dtype)
            return Affine(wide(kernel), wide(self.param(f"{name}_bias", start, (after,), self.param_dtype)))

        hidden, update = affine("hidden", branches + M, 2 * M), affine("update", 2 * M, M)
        return partial(memory_cell, decay, moved, hidden, update, self.activation)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> ELMState:
        branches, size = self._sizes()
        zeros = lambda width: jnp.zeros((batch_size, width), accumulator(dtype))
        return ELMState(zeros(branches * size if self.version == 1 else branches), zeros(self.num_memory))

    @nn.nowrap
    def _routes(self) -> tuple[np.ndarray, np.ndarray]:
        """The channel of each synapse, and whether there is one."""
        (branches, size), D = self._sizes(), self.d_model
        if self.routing == "none":
            return np.arange(D), np.ones(D, bool)
        if self.routing == "random":
            return np.random.default_rng(D).integers(D, size=branches * size), np.ones(branches * size, bool)
        k = np.arange(D)
        halves = k // 2 + (k % 2) * -(-D // 2)
        places = (-(-D // branches) * np.arange(branches)[:, None] + np.arange(size)).ravel()
        return halves[np.minimum(places, D - 1)], places < D

    @nn.nowrap
    def _sizes(self) -> tuple[int, int]:
        """Branches, and synapses of each."""
        for name, known in (("routing", ROUTINGS), ("version", (1, 2)), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; ELM takes {', '.join(map(str, known))}.")
        branches = self.d_model if self.num_branches is None else self.num_branches
        for name, value in (("num_memory", self.num_memory), ("num_branches", branches)):
            if value < 1:
                raise ValueError(f"{name}={value}; ELM takes 1 or more.")
        if not 1 < self.max_tau < np.inf:
            raise ValueError(f"max_tau={self.max_tau}; ELM takes a number above 1.")
        above_zero(self, "trace_tau", "step_size", "update_scale")
        if self.routing == "none":
            if self.d_model % branches or self.branch_size not in (None, self.d_model // branches):
                raise ValueError(
                    f"num_branches={branches} of branch_size={self.branch_size}: without routing they share "
                    f"d_model={self.d_model} channels."
                )
            return branches, self.d_model // branches
        if self.branch_size is None or self.branch_size < 1:
            raise ValueError(f"branch_size={self.branch_size}; ELM with routing takes 1 or more.")
        stride = -(-self.d_model // branches)
        if self.routing == "interleaved" and self.branch_size < stride:
            raise ValueError(
                f"branch_size={self.branch_size}: {branches} interleaved branches of d_model={self.d_model} channels "
                f"begin {stride} apart; smaller ones would leave channels out."
            )
        return branches, self.branch_size
