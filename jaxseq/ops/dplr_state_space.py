"""x' = (Λ − P P*) x + B u, y = 2 Re(C x), as in S4: the kernel by Woodbury's identity, and the recurrence."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import scan
from ..exact import einsum, matmul
from ..monoid import MatrixAffine, matrix_affine
from ..segments import segment_starts
from ..shapes import Array, Complex, Float, Int, accumulator, promoted, typed, zeros_from
from ..sharded import across_devices, is_split
from .convolution import fourier_convolution
from .dispatch import dispatch

# N complex states stand for N conjugate pairs: P* x over both of each pair is 2 Re(conj(P) x), a real number.


class System(NamedTuple):
    """The continuous state space of D channels, a rank of R."""

    Lambda: Complex[Array, "D N"]
    P: Complex[Array, "D R N"]
    B: Complex[Array, "D N"]
    C: Complex[Array, "D N"]
    dt: Float[Array, "D"]


def discretised(s: System):
    """The function x ↦ Ā x, of `B D N`, and B̄: Ā = (1 − dt A/2)⁻¹ (1 + dt A/2), B̄ = (1 − dt A/2)⁻¹ dt B.

    The inverse is Woodbury's, so that both cost O(N R) a channel.
    """
    real, dt = s.dt[:, None] / 2, s.dt[:, None].astype(s.P.dtype)
    half = dt / 2
    shrink = 1 / (1 - half * s.Lambda)
    project = lambda x: 2 * einsum("drn,bdn->bdr", s.P.conj(), x).real
    spread = lambda r: einsum("drn,bdr->bdn", s.P, r.astype(s.P.dtype))
    small = 2 * einsum("drn,dn,dsn->drs", s.P.conj(), shrink, s.P).real
    inverse = _inverse(jnp.eye(s.P.shape[1], dtype=real.dtype)[None] + real[..., None] * small)

    def solve(b):
        r = einsum("drs,bds->bdr", inverse, project(shrink[None] * b))
        return shrink[None] * (b - spread(real[None] * r))

    apply = lambda x: solve(x + half[None] * (s.Lambda[None] * x - spread(project(x))))
    return apply, solve((dt * s.B)[None])[0]


def _inverse(M):
    """Of `… R R`, R = 1 or 2, without a library call."""
    if M.shape[-1] == 1:
        return 1 / M
    a, b, c, d = M[..., 0, 0], M[..., 0, 1], M[..., 1, 0], M[..., 1, 1]
    adjugate = jnp.stack([jnp.stack([d, -b], axis=-1), jnp.stack([-c, a], axis=-1)], axis=-2)
    return adjugate / (a * d - b * c)[..., None, None]


def _transition(s: System):
    """Ā on real and imaginary parts: `D 2N 2N`."""
    D, N = s.Lambda.shape
    unit = jnp.eye(N, dtype=s.Lambda.dtype)[:, None]
    columns = discretised(s)[0](jnp.broadcast_to(jnp.concatenate([unit, 1j * unit]), (2 * N, D, N)))
    return jnp.moveaxis(_parts(columns), 0, -1)


def _parts(x):
    return jnp.concatenate([x.real, x.imag], axis=-1)


def _joined(parts):
    return lax.complex(*jnp.split(parts, 2, axis=-1))


def _power(M, exponent: int, rows):
    """rows M^exponent, of `… R N` and `… N N`, by squaring."""
    while exponent:
        rows = matmul(rows, M) if exponent % 2 else rows
        exponent //= 2
        M = matmul(M, M) if exponent else M
    return rows


@typed
def dplr_kernel(
    Lambda: Complex[Array, "D N"],
    P: Complex[Array, "D R N"],
    B: Complex[Array, "D N"],
    C: Complex[Array, "D N"],
    dt: Float[Array, "D"],
    length: int,
) -> Float[Array, "L D"]:
    """The impulse response of `dplr_state_space`, lag by lag: 2 Re(C Ā^l B̄).

    Its transform at ω, the roots of unity times r, is a Cauchy product, corrected for the low rank (S4, arXiv
    2111.00396, algorithm 1): with d_n = (1 − ω)/dt − (1 + ω)/2 Λ_n and ⟨X, Y⟩ = Σ X_n Y_n / d_n over both of each pair,

        K̂ = ⟨C̃, B⟩ − (1 + ω)/2 ⟨C̃, P⟩ (1 + (1 + ω)/2 ⟨P̄, P⟩)⁻¹ ⟨P̄, B⟩        C̃ = C (1 − (r Ā)^L)

    is the transform of r^l K_l, without a singular point at ω = −1. O(D·N·L) in time and memory, and D·N³ log L for C̃.
    The authors' circle has r = 1: where states hardly decay over L steps 1 − Ā^L, and d at ω = 1, are small there, and
    gradients of no digit; on one of r = exp(−2/L) neither is.
    """
    s, r = System(Lambda, P, B, C, dt), np.exp(-2 / length)
    row = jnp.concatenate([C.real, -C.imag], axis=-1)
    left_over = _power(_transition(s), length, row[:, None])[:, 0]
    re, im = jnp.split(row - jnp.asarray(r**length, row.dtype) * left_over, 2, axis=-1)
    rest = lax.complex(re, -im)
    omega = r * np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    a = jnp.asarray(1 - omega, Lambda.dtype)[:, None] / dt[None].astype(Lambda.dtype)
    b = jnp.asarray((1 + omega) / 2, Lambda.dtype)[:, None]
    left, right = (jnp.concatenate([x[:, None], y], axis=1) for x, y in ((rest, P.conj()), (B, P)))
    XY = left[:, :, None] * right[:, None]
    # Both of a pair: XY/(a − bΛ) + its mirror = (a 2 Re(XY) − b 2 Re(XY Λ̄)) / ((a − bΛ)(a − bΛ̄))
    d, mirror = (a[..., None] - b[..., None] * x[None] for x in (Lambda, Lambda.conj()))
    reciprocal = 1 / (d * mirror)
    over = lambda X: einsum("ldn,drsn->ldrs", reciprocal, 2 * X.real.astype(reciprocal.dtype))
    pair = lambda x: x[..., None, None]
    k = pair(a) * over(XY) - pair(b) * over(XY * Lambda[:, None, None].conj())
    low_rank = _inverse(jnp.eye(P.shape[1], dtype=k.dtype)[None, None] + pair(b) * k[..., 1:, 1:])
    correction = einsum("ldr,ldrs,lds->ld", k[..., 0, 1:], low_rank, k[..., 1:, 0])
    shrunk = jnp.fft.irfft(k[..., 0, 0] - b * correction, length, axis=0)
    return shrunk * jnp.asarray(r ** -np.arange(length), shrunk.dtype)[:, None]


def sequential(u, starts, system, x):
    """Step by step; the state restarts where `starts` says so."""
    apply, B = discretised(system)

    def step(x, token):
        u, start = token
        x = apply(jnp.where(start[:, None, None], 0, x)) + B[None] * u[..., None].astype(B.dtype)
        return x, 2 * einsum("bdn,dn->bd", x, system.C).real

    return scan.loop(step, x, (u, starts))


def convolution(u, starts, system, x, from_zero):
    """The kernel by FFT, from zero. The last state comes of the recurrence, and from a first one y comes with it."""
    y, final = sequential(u, starts, system, x)
    return fourier_convolution(u, dplr_kernel(*system, u.shape[1])) if from_zero else y, final


@typed
def dplr_state_space(
    u: Float[Array, "B T D"],
    Lambda: Complex[Array, "D N"],
    P: Complex[Array, "D R N"],
    B: Complex[Array, "D N"],
    C: Complex[Array, "D N"],
    dt: Float[Array, "D"],
    *,
    initial_state: Complex[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Complex[Array, "B D N"]]:
    """S4: a state space whose matrix is diagonal plus low rank, discretised by the bilinear rule.

        x' = (Λ − P P*) x + B u        y = 2 Re(C x)

    N counts one state of each conjugate pair; the rank R is 1 or 2. `initial_state` is x_0, zeros when None; a change
    of `segment_ids` restarts from zero, which only `sequential` can do. `convolution` costs O(T log T) a channel and
    O(T·D·N) for the kernel; where the final state is used it steps through time beside, and where there is an initial
    one, or time is split over devices, it does that alone.

    Raises:
      ValueError: shapes disagree, T = 0, or R is neither 1 nor 2.
      NotImplementedError: `impl` is none of the forms, or is "convolution" with `segment_ids`.
    """
    if u.shape[1] == 0:
        raise ValueError(f"u has shape {u.shape}; dplr_state_space takes at least one step of time.")
    if P.shape[1] not in (1, 2):
        raise ValueError(f"P has shape {P.shape}: rank {P.shape[1]}; dplr_state_space takes 1 or 2.")
    if impl == "convolution" and segment_ids is not None:
        raise NotImplementedError("impl='convolution' cannot restart at segment_ids; choose None or 'sequential'.")
    dtype = accumulator(u.dtype)
    wide = promoted(Lambda.dtype, dtype)
    Lambda, P, B, C = (M.astype(wide) for M in (Lambda, P, B, C))
    system = System(Lambda, P, B, C, dt.astype(dtype))
    starts = jnp.zeros(u.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    from_zero = initial_state is None and not is_split()
    forms: dict[str, Callable] = {"sequential": sequential, "convolution": partial(convolution, from_zero=from_zero)}
    best = "sequential" if u.shape[1] == 1 or segment_ids is not None else "convolution"
    run = lambda state: dispatch("dplr_state_space", impl, forms, best)(u.astype(dtype), starts, system, state)
    state = zeros_from(u, (u.shape[0], *Lambda.shape), wide, plus=initial_state)
    on_parts = lambda parts: (lambda y, final: (y, _parts(final)))(*run(_joined(parts)))
    total = lambda: _total(system, starts, run(jnp.zeros_like(state))[1])
    y, final = across_devices(matrix_affine, total, on_parts, _parts(state))
    return y.astype(u.dtype), _joined(final)


def _total(system, starts, final) -> MatrixAffine:
    """All tokens as one element, on real and imaginary parts."""
    kept = jnp.all(~starts, axis=1)[:, None, None, None]
    step = _transition(system)
    matrix = _power(step, starts.shape[1], jnp.broadcast_to(jnp.eye(step.shape[-1], dtype=step.dtype), step.shape))
    return MatrixAffine(jnp.where(kept, matrix[None], 0), _parts(final))
