"""Chimera: a state space model over time and variates at once."""

from functools import reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.initialisers import log_of_uniform, step_size_bias
from ..layers.mixer import at_least
from ..layers.projection import projection
from ..shapes import Array, Float, Int, accumulator, check_width, typed

COUPLINGS = ("both", "none", "time")


def _zero_order_hold(rate, dt):
    left = -jnp.expm1(-rate * dt)
    return jnp.exp(-rate * dt), left, left / rate


def _bilinear(rate, dt):
    half = rate * dt / 2
    return (1 - half) / (1 + half), 2 * jnp.minimum(half, 1) / (1 + half), dt / (1 + half)


def _euler(rate, dt):
    return jnp.exp(-rate * dt), -jnp.expm1(-rate * dt), dt


#: From a rate and a step `(ā, 1 − |ā|, b̄ / b)`: held inputs, the bilinear rule, or Mamba's b̄ = Δ b. What is left of 1
#: is made by itself, since a difference has no digits where ā is near 1.
DISCRETISATIONS = {"zoh": _zero_order_hold, "bilinear": _bilinear, "euler": _euler}


class ChimeraState(NamedTuple):
    """h1 and h2 of the last time step, for each direction over the variates."""

    over_time: Float[Array, "E B V N"]
    over_variates: Float[Array, "E B V N"]


def _joined(first, *rest):
    """Channels of both directions side by side."""
    return jnp.concatenate([first, *rest], axis=-1) if rest and first is not None else first


class Chimera(nn.Module):
    """A grid of time steps and variates, each cell of which feeds the next in both (arXiv 2406.04320, section 3).

        h1(t,v) = ā1 h1(t−1,v) + ā2 h2(t−1,v) + b̄1 x(t,v)        ā1, b̄1 of the rate A1 and the step Δ1
        h2(t,v) = ā3 h1(t,v−1) + ā4 h2(t,v−1) + b̄2 x(t,v)        ā4, b̄2 of the rate A4 and the step Δ2
        y(t,v) = c1·h1(t,v) + c2·h2(t,v)

    for each of D channels, with N states. A small step Δ1 makes a long memory of time, a large one a short; Δ2 the same
    over variates. `input_dependent` steps softplus(x W + b), b_i and c_i are made of x, otherwise they are parameters.
    Rates A1 and A4 are parameters, N a channel or with `scalar` one.

    The couplings are ā2 = (1 − |ā1|) ρ tanh A2 and ā3 = (1 − |ā4|) ρ tanh A3, as in `contractive`: the paper's own,
    exponentials all four, grow without bound. Of held inputs no state outgrows max |b x| / (rate (1 − ρ)). With
    `coupling` "none" they are zero, which is a model over time and one over the variates, and with "time" h2 is left
    out: Mamba's scan of each variate by itself.

    Time is causal; over the variates `bidirectional` adds the same model from the last to the first, with parameters of
    its own. The state is 2 V D N numbers a direction, whatever t.

    Not built, of the paper: companion matrices for A1 and A2 (every A is diagonal), forecasts in closed loop (those of
    `ChimeraForecaster` are one map of all cells), and the reconstruction loss for anomalies.

    Raises:
      ValueError: a field is unknown or out of range, x has another width, no step, or there is no variate.
      NotImplementedError: time is split over devices, unless `coupling` is "time".
    """

    d_model: int
    state_size: int = 16
    dt: tuple[float, float] = (1e-3, 0.1)
    dt_variates: tuple[float, float] = (0.1, 1.0)
    discretisation: str = "zoh"
    input_dependent: bool = True
    scalar: bool = False
    coupling: str = "both"
    rho: float = 0.9
    bidirectional: bool = True
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @typed
    def __call__(
        self, x: Float[Array, "B T V D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V D"]:
        """The whole grid: `B T V D → B T V D`."""
        return self.prefill(x, None, segment_ids)[0]

    @typed
    def step(self, x: Float[Array, "B V D"], state: ChimeraState):
        """One time step of all variates: `(x_t "B V D", state) → (y_t "B V D", state)`."""
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    @nn.compact
    @typed
    def prefill(
        self, x: Float[Array, "B T V D"], state: ChimeraState | None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T V D"], ChimeraState]:
        """From a state, None at the start: `(y "B T V D", state)`. A change of `segment_ids` restarts time."""
        check_width(x, self.d_model, "Chimera")
        if state is None:
            state = self.init_state(x.shape[0], variates=x.shape[2], dtype=accumulator(x.dtype))
        names = ("forwards", "backwards")[: 1 + self.bidirectional]
        # Both directions are one grid of twice the channels, the variates of the second in reverse.
        turned = lambda x, e, axis=2: jnp.flip(x, axis) if e else x
        ways = [self._way(name, turned(x, e)) for e, name in enumerate(names)]
        operands = [_joined(*parts) for parts in zip(*(operands for operands, _ in ways), strict=True)]
        before = tuple(_joined(*(turned(part, e, 1) for e, part in enumerate(parts))) for parts in state)
        a1, a2, a3, a4, u1, u2 = operands
        if self.coupling == "time":
            h1, last = ops.linear_recurrence(a1, u1, initial_state=before[0], segment_ids=segment_ids, impl=self.impl)
            states, after = (h1,), (last, before[1])
        else:
            states = ops.grid_recurrence(
                a1, a2, a3, a4, u1, u2, initial_state=before, segment_ids=segment_ids, impl=self.impl
            )
            after = tuple(h[:, -1] for h in states)
        each = lambda h: jnp.split(h, len(ways), axis=-1)
        parts = [turned(read(*h), e) for e, ((_, read), *h) in enumerate(zip(ways, *map(each, states), strict=True))]
        kept = [jnp.stack([turned(h, e, 1) for e, h in enumerate(each(h))]) for h in after]
        return reduce(jnp.add, parts).astype(x.dtype), ChimeraState(*(h.astype(state.over_time.dtype) for h in kept))

    def _way(self, name: str, x):
        """Of one direction over the variates: a1 … a4, u1, u2 `B T V D*N`, and what reads the states."""
        wide, (D, N) = accumulator(x.dtype), (self.d_model, self.state_size)
        u, cells = x.astype(wide)[..., None], x.shape[:-1]

        def parameter(name_, init, shape):
            return self.param(f"{name}_{name_}", init, shape, self.param_dtype).astype(wide)[None, None, None]

        def made(what, size, start=None):
            return projection(size, f"{name}_{what}_proj", self, kernel_init=start)(x).astype(wide)

        def vector(what):
            """b or c: of the input, for all channels, or a parameter of each."""
            if self.input_dependent:
                return made(what, N, nn.initializers.lecun_normal())[..., None, :]
            return parameter(what, nn.initializers.normal(N**-0.5), (D, N))

        def coefficients(axis: str, dt_range):
            rate = parameter(f"A_{axis}", log_of_uniform(0.5, N), (D, 1 if self.scalar else N))
            bias = parameter(f"dt_{axis}_bias", step_size_bias(*dt_range), (D,))
            dt = nn.softplus((made(f"dt_{axis}", D) if self.input_dependent else 0) + bias)[..., None]
            a, left, b = DISCRETISATIONS[self.discretisation](jnp.exp(rate), dt)
            return a, left, b * vector(f"b_{axis}") * u

        def coupled(axis: str, left):
            """What this axis takes of the other state."""
            if self.coupling != "both":
                return None
            return left * self.rho * jnp.tanh(parameter(f"coupling_{axis}", nn.initializers.normal(1.0), (D, N)))

        flat = lambda a: None if a is None else jnp.broadcast_to(a, (*cells, D, N)).reshape(*cells, D * N)
        a1, left1, u1 = coefficients("time", self.dt)
        axes, operands = ["time"], [a1, None, None, None, u1, None]
        if self.coupling != "time":
            a4, left4, u2 = coefficients("variates", self.dt_variates)
            axes, operands = [*axes, "variates"], [a1, coupled("time", left1), coupled("variates", left4), a4, u1, u2]
        vectors = [vector(f"c_{axis}") for axis in axes]

        def read(*states):
            return reduce(
                jnp.add, [jnp.sum(c * h.reshape(*cells, D, N), -1) for c, h in zip(vectors, states, strict=True)]
            )

        return [flat(a) for a in operands], read

    @nn.nowrap
    def init_state(self, batch_size: int, *, variates: int, dtype=jnp.float32) -> ChimeraState:
        """Zeros, in at least float32."""
        at_least(self, state_size=1)
        if variates < 1:
            raise ValueError(f"variates={variates}; Chimera takes 1 or more.")
        for name, choices in (("discretisation", DISCRETISATIONS), ("coupling", COUPLINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; Chimera takes one of {', '.join(choices)}.")
        for name in ("dt", "dt_variates"):
            low, high = getattr(self, name)
            if not 0 < low < high:
                raise ValueError(f"{name}={(low, high)}; Chimera takes a least and a most step, 0 < least < most.")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho={self.rho}; Chimera takes 0 or more, below 1.")
        shape = (1 + self.bidirectional, batch_size, variates, self.d_model * self.state_size)
        return ChimeraState(*(jnp.zeros(shape, accumulator(dtype)) for _ in range(2)))
