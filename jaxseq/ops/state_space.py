"""Diagonal state spaces x' = A x + B u: discretisation, the convolution kernel of one input, and the recurrences."""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax, vmap

from ..exact import einsum
from ..monoid import Affine, affine
from ..shapes import Array, Complex, Float, Int, accumulator, promoted, typed
from ..sharded import across_devices, is_split
from .convolution import fourier_convolution
from .dispatch import dispatch
from .linear_recurrence import linear_recurrence
from .selective_scan import selective_scan


@typed
def zero_order_hold(
    A: Complex[Array, "..."], B: Complex[Array, "..."], dt: Complex[Array, "..."]
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    """Ā = exp(dt A), B̄ = (exp(dt A) − 1)/A · B: exact for an input that is constant over a step."""
    z = dt * A
    small = jnp.abs(z) < 1e-3  # where (e^z − 1)/z loses its digits, its series has them all
    large = jnp.where(small, 1, z)
    ratio = jnp.where(small, 1 + z / 2 * (1 + z / 3), jnp.expm1(large) / large)
    return z, dt * ratio * B


@typed
def bilinear(
    A: Complex[Array, "..."], B: Complex[Array, "..."], dt: Complex[Array, "..."]
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    """Ā = (1 + dt A/2)/(1 − dt A/2), B̄ = dt B/(1 − dt A/2)."""
    z = dt * A / 2
    return jnp.log1p(z) - jnp.log1p(-z), dt * B / (1 - z)


#: Each takes (A, B, dt), all complex, and returns (log Ā, B̄).
DISCRETISATIONS: dict[str, Callable] = {"zoh": zero_order_hold, "bilinear": bilinear}


def _powers(log_A, exponents):
    """Ā^l = exp(l log Ā), `L D N`: never repeated products, which drift."""
    return jnp.exp(log_A[None] * exponents.astype(log_A.dtype)[:, None, None])


def _two_levels(log_A, length: int):
    """Ā^{iQ}, `I D N`, and Ā^j, `Q D N`, whose products are all powers below Ā^length; I and Q about √length."""
    stride = max(1, math.isqrt(length))
    return _powers(log_A, stride * jnp.arange(-(-length // stride))), _powers(log_A, jnp.arange(stride))


@typed
def diagonal_kernel(
    log_A: Complex[Array, "D N"], B: Complex[Array, "D N"], C: Complex[Array, "D N"], length: int
) -> Float[Array, "L D"]:
    """The impulse response of a discretised diagonal state space with conjugate pairs, lag by lag.

        K_l = 2 Re Σ_n C_n B̄_n Ā_n^l        (S4D, arXiv 2206.11893, eq. 4)

    O(D·N·√L) exponentials and memory, and a product of matrices of O(D·N·L).
    """
    coarse, fine = _two_levels(log_A, length)
    coarse, product = coarse * (B * C)[None], partial(einsum, "idn,jdn->ijd")
    kernel = product(coarse.real, fine.real) - product(coarse.imag, fine.imag)
    return 2 * kernel.reshape(-1, kernel.shape[-1])[:length]


def _decayed_to_end(u, log_A):
    """Σ_l Ā^{L-1-l} u_l, `B D N`."""
    coarse, fine = _two_levels(log_A, u.shape[1])
    rows, stride = len(coarse), len(fine)
    u = jnp.pad(u, ((0, 0), (rows * stride - u.shape[1], 0), (0, 0))).reshape(-1, rows, stride, u.shape[2])
    sums = (einsum("bijd,jdn->bidn", u, part[::-1]) for part in (fine.real, fine.imag))
    return einsum("bidn,idn->bdn", lax.complex(*sums), coarse[::-1])


def convolution(u, log_A, B, C, state):
    """The kernel by FFT; an initial state responds as an input does, and the final state is one sum over the inputs."""
    length = u.shape[1]
    y = fourier_convolution(u, diagonal_kernel(log_A, B, C, length))
    from_zero = B[None] * _decayed_to_end(u, log_A)
    if state is None and not is_split():
        return y, from_zero
    total = Affine(jnp.exp(length * log_A)[None], from_zero)

    def run(state):
        response = vmap(lambda x: diagonal_kernel(log_A, x, C, length))(jnp.exp(log_A)[None] * state)
        return y + response, affine.act(total, state)

    return across_devices(affine, lambda: total, run, jnp.zeros_like(from_zero) if state is None else state)


def recurrence(u, log_A, B, C, state, segment_ids, impl):
    return selective_scan(u, jnp.ones_like(u), log_A, B, C, initial_state=state, segment_ids=segment_ids, impl=impl)


@typed
def diagonal_state_space(
    u: Float[Array, "B T D"],
    log_A: Complex[Array, "D N"],
    B: Complex[Array, "D N"],
    C: Complex[Array, "D N"],
    *,
    initial_state: Complex[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D N"]]:
    """A discretised diagonal state space with one input and one output a channel, as in S4D.

        x_t = Ā x_{t-1} + B̄ u_t        y_t = 2 Re(C x_t)

    N counts one state of each conjugate pair; `log_A` is log Ā, `B` is B̄. `initial_state` is x_0, zeros when None;
    a change of `segment_ids` restarts from zero, which only the scan forms can do: they are those of
    `selective_scan`. `convolution` costs O(T log T) a channel and O(T·D·N) for the kernel.

    Raises:
      ValueError: shapes disagree, or T = 0.
      NotImplementedError: `impl` is none of the forms, or is "convolution" with `segment_ids`.
    """
    if u.shape[1] == 0:
        raise ValueError(f"u has shape {u.shape}; diagonal_state_space takes at least one step of time.")
    if impl == "convolution" and segment_ids is not None:
        raise NotImplementedError("impl='convolution' cannot restart at segment_ids; choose None or a scan form.")
    dtype = accumulator(u.dtype)
    complex_dtype = promoted(log_A.dtype, dtype)
    scans = {
        name: partial(recurrence, segment_ids=segment_ids, impl=name) for name in ("sequential", "parallel", "chunked")
    }
    forms = scans | {"convolution": convolution}
    best = "sequential" if u.shape[1] == 1 else "convolution" if segment_ids is None else "chunked"
    state = None if initial_state is None else initial_state.astype(complex_dtype)
    operands = (M.astype(complex_dtype) for M in (log_A, B, C))
    y, final = dispatch("diagonal_state_space", impl, forms, best)(u.astype(dtype), *operands, state)
    return y.astype(u.dtype), final


@typed
def mimo_state_space(
    u: Float[Array, "B T D"],
    decay: Complex[Array, "#B #T N"],
    B: Complex[Array, "N D"],
    C: Complex[Array, "F N"],
    *,
    gain: Complex[Array, "#B #T N"] | None = None,
    initial_state: Complex[Array, "B N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    impl: str | None = None,
) -> tuple[Float[Array, "B T F"], Complex[Array, "B N"]]:
    """A discretised diagonal state space of all inputs at once, as in S5 (arXiv 2208.04933, section 3) and the LRU.

        x_t = decay_t ⊙ x_{t-1} + gain_t ⊙ B u_t        y_t = Re(C x_t)

    `gain` is 1 and `initial_state` x_0 zeros when None; a change of `segment_ids` restarts from zero; in reverse time
    runs backwards. The forms are those of `linear_recurrence`, O(T·N) beside the products with B and C.

    Raises:
      ValueError: shapes disagree, or T = 0.
      NotImplementedError: `impl` is none of the forms.
    """
    wide = accumulator(u.dtype)
    inputs = lax.complex(*(einsum("btd,nd->btn", u.astype(wide), M.astype(wide)) for M in (B.real, B.imag)))
    inputs = inputs if gain is None else gain.astype(inputs.dtype) * inputs
    x, final = linear_recurrence(
        decay.astype(inputs.dtype), inputs,
        initial_state=initial_state, segment_ids=segment_ids, reverse=reverse, impl=impl,
    )  # fmt: skip
    re, im = (einsum("btn,fn->btf", a, M.astype(wide)) for a, M in ((x.real, C.real), (x.imag, C.imag)))
    return (re - im).astype(u.dtype), final
