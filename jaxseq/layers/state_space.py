"""What linear state spaces with one input and one output a channel share: S4, S4D, DSS."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..ops.convolution import fourier_convolution
from ..shapes import Array, Complex, accumulator, known, promoted
from ..sharded import check_whole
from .bidirectional import two_sided
from .gated_output import gated_output
from .initialisers import inverse_softplus, log_uniform
from .mixer import Mixer

#: Maps from a free parameter to a positive number, and their inverses.
POSITIVE: dict[str, tuple[Callable, Callable]] = {
    "exp": (jnp.exp, jnp.log),
    "none": (lambda x: x, lambda x: x),
    "relu": (lambda x: nn.relu(x) + 1e-4, lambda x: x - 1e-4),
    "softplus": (nn.softplus, inverse_softplus),
    "sigmoid": (nn.sigmoid, lambda x: jnp.log(x / (1 - x))),
}


def parameter(module: nn.Module, dtype) -> Callable[..., Array]:
    """`(name, initialiser, *shape) -> array`: a parameter of the module, computed with in `dtype`."""
    return lambda name, start, *shape: module.param(name, start, shape, module.param_dtype).astype(dtype)


def positive(value, kind: str) -> Callable:
    """An initialiser: what the map `kind` takes to these positive numbers, 1e-4 at least.

    Raises:
      ValueError: the map is a sigmoid, and one of them is 1 or more.
    """
    if kind == "sigmoid" and (values := known(value)) is not None and (values >= 1).any():
        raise ValueError(f"the map 'sigmoid' reaches numbers below 1; this start has {values.max():g}: take another.")
    return lambda _, shape, dtype: jnp.broadcast_to(POSITIVE[kind][1](jnp.maximum(value, 1e-4)).astype(dtype), shape)


def pairs(value: np.ndarray) -> Callable:
    """An initialiser: complex numbers as pairs of a real and an imaginary part."""
    parts = np.stack([value.real, value.imag], axis=-1)
    return lambda _, shape, dtype: jnp.broadcast_to(jnp.asarray(parts, dtype), shape)


def as_complex(pair: Array) -> Array:
    """`… 2` → `…`."""
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def step_size(module: Mixer, param: Callable, *shape: int, kind: str = "exp", copies: int = 1) -> Array:
    """dt: the parameter log_dt, log-uniform between the module's `dt_min` and `dt_max`, times its `rate`.

    The last axis is `copies` times that of `shape`: parameters of their own that start alike.
    """
    drawn = log_uniform(module.dt_min, module.dt_max)

    def start(key, _, dtype):
        log_dt = jnp.tile(drawn(key, shape, dtype), copies)
        return log_dt if kind == "exp" else inverse_softplus(jnp.exp(log_dt))

    return module.rate * POSITIVE[kind][0](param("log_dt", start, *shape[:-1], copies * shape[-1]))


def readouts(module: Mixer, param: Callable, *shape: int, variance: float = 1.0) -> list[Array]:
    """C, and one for the other direction of time where there is one; complex, of this variance at first."""
    names = ("C", "C_backward") if module.bidirectional else ("C",)
    return [as_complex(param(name, nn.initializers.normal((variance / 2) ** 0.5), *shape, 2)) for name in names]


def check_steps(module: Mixer) -> None:
    """Raise on step sizes and a sampling rate that are none."""
    name = type(module).__name__
    if not 0 < module.dt_min < module.dt_max:
        raise ValueError(f"dt_min={module.dt_min} and dt_max={module.dt_max}; {name} takes 0 < dt_min < dt_max.")
    if not 0 < module.rate < math.inf:
        raise ValueError(f"rate={module.rate}; {name} takes a positive ratio of sampling intervals.")


def check_choice(module: Mixer, allowed, *names: str) -> None:
    """Raise unless the fields of these names are among those allowed."""
    for name in names:
        _check_known(module, allowed, name, getattr(module, name))


def _check_known(module: Mixer, allowed, name: str, value) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown to {type(module).__name__}; choose one of {', '.join(allowed)}.")


def in_turn(module: Mixer, allowed, name: str) -> tuple[str, ...]:
    """What the field of this name says of each of the module's copies: one for all, or a tuple for them in turn.

    Raises:
      ValueError: the copies do not divide the channels, the tuple not the copies, or a value is not allowed.
    """
    if module.num_copies is not None:
        module.checked_heads(num_copies=module.num_copies)
    field, copies = getattr(module, name), module.num_copies or module.d_model
    values = field if isinstance(field, tuple) else (field,)
    for value in values:
        _check_known(module, allowed, name, value)
    if not values or copies % len(values):
        raise ValueError(
            f"{name}={field!r}; {type(module).__name__} takes one, or a tuple whose length divides {copies} copies."
        )
    return values * (copies // len(values))


def check_pairs(module: Mixer) -> None:
    """Raise unless states come in conjugate pairs."""
    if (size := module.state_size) < 2 or size % 2:
        raise ValueError(f"state_size={size}; {type(module).__name__} takes an even number: states come in pairs.")


class StateSpaceState(NamedTuple):
    ssm: Complex[Array, "B D N"]


class StateSpace(Mixer):
    """A mixer that may look both ways, with a field `bidirectional`; it has a state where it does not."""

    bidirectional = False

    def start(self, x, *, max_length: int | None = None):
        """None: a convolution from the start costs less than one from a state of zeros."""

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return "bidirectional=True" if self.bidirectional else None


def zeroed(x: Array, mask: Array | None) -> Array:
    """x with zeros at tokens that `mask` leaves out: a state of zeros stays one over them."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def state_space_layer(
    module: StateSpace, run: Callable, kernel: Callable, x, state: StateSpaceState | None, segment_ids, mask=None
):
    """y + D ⊙ x through the module's `output`, an exact GELU in it, and the state after x.

    `run(u, direction, initial_state=…, segment_ids=…)` makes y and a state, and `kernel(direction, length)` is its
    impulse response; direction 1 is that of `two_sided`, where the module is bidirectional. D is a parameter.

    Raises:
      ValueError: there is a mask, and the module is causal.
      NotImplementedError: the module is bidirectional, and time is split over devices.
    """
    module.check_mask(mask)
    u = zeroed(x, mask).astype(accumulator(x.dtype))
    if module.bidirectional:
        check_whole("bidirectional=True", "give every device whole sequences")
        if segment_ids is None and module.impl in (None, "convolution"):
            y = fourier_convolution(u, kernel(0, x.shape[1]), later=kernel(1, x.shape[1]))
        else:
            y = two_sided(lambda u, ids, direction: run(u, direction, segment_ids=ids)[0], u, segment_ids)
        after = None
    else:
        initial = None if state is None else state.ssm
        y, ssm = run(u, 0, initial_state=initial, segment_ids=segment_ids)
        after = StateSpaceState(ssm if state is None else ssm.astype(state.ssm.dtype))
    D = parameter(module, u.dtype)("D", nn.initializers.normal(1.0), x.shape[-1])
    return gated_output(module, (y + D[None, None] * u).astype(x.dtype), module.output, approximate=False), after


def empty_state_space(module: StateSpace, batch_size: int, states: int, dtype) -> StateSpaceState:
    """Zeros, for a causal module with this many complex states a channel."""
    module.check_causal()
    return StateSpaceState(jnp.zeros((batch_size, module.d_model, states), promoted(dtype, jnp.complex64)))
