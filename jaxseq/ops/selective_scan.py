"""Mamba's S6: h_t = exp(dt_t A) ⊙ h_{t-1} + (dt_t x_t) B_tᵀ, y_t = h_t C_t + D ⊙ x_t."""

from collections.abc import Callable
from functools import partial
from math import log

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..exact import einsum, matmul
from ..monoid import Affine, affine
from ..segments import segment_starts
from ..shapes import Array, Float, Inexact, Int, accumulator, promoted, typed, zeros_from
from ..sharded import across_devices, own
from .dispatch import dispatch
from .linear_recurrence import recurrence
from .tokenwise import Inputs, tokenwise

# The forms take x, dt `B T D`, keep `B T` (0 where the state restarts), A `D N`, B and C `B T G N` or `1 1 G N` where
# group g serves D/G channels, and a state `B D N`; they return the read-out `B T D`, complex where A is.


def _element(x, dt, keep, A, B) -> Affine:
    """The affine map of one or many tokens, from terms that broadcast."""
    x, dt, keep = (a.astype(A.dtype) for a in (x, dt, keep))
    return Affine(jnp.exp(dt * A) * keep, dt * x * B)


def sequential(x, dt, keep, A, B, C, h):
    def step(h, token):
        x, dt, keep, B, C = token
        h = affine.act(_elements(x, dt, keep, A, B), h)
        return h, _read(h, C)

    B, C = (jnp.broadcast_to(M, (*x.shape[:2], *M.shape[2:])) for M in (B, C))
    return scan.loop(step, h, (x, dt, keep, B, C))


def parallel(impl, x, dt, keep, A, B, C, h):
    """Every state at once: T·D·N numbers."""
    decay, inputs = _elements(x, dt, keep, A, B)
    states, h = recurrence(impl)(jnp.broadcast_to(decay, inputs.shape), inputs, h)
    return _read(states, C), h


def _elements(x, dt, keep, A, B) -> Affine:
    """Of states `… D N`."""
    A = A.reshape((1,) * (x.ndim - 1) + A.shape)
    B = jnp.repeat(B, x.shape[-1] // B.shape[-2], axis=-2)
    return _element(x[..., None], dt[..., None], keep[..., None, None], A, B)


def _read(h, C):
    groups = h.reshape(*h.shape[:-2], C.shape[-2], -1, h.shape[-1])
    return einsum("...gdn,...gn->...gd", groups, C).reshape(h.shape[:-1])


def in_rows(x, dt, keep, A, B, C, h):
    """One token after the other, of states `N B D`: one vector loop runs over all B·D. The gradient keeps them all.

    XLA computes a sum that it fused with what makes its terms up to seven times slower on a CPU than a product with
    ones. The read-out is such a sum, and so is the gradient of whatever is broadcast: here all are products.
    """
    (channels, N), length = A.shape, x.shape[1]
    ones = lambda *shape: jnp.ones(shape, A.dtype)
    spread = lambda a: matmul(ones(N, 1), a.astype(A.dtype).reshape(1, -1)).reshape(N, *a.shape)
    # Of `… B G`, whose axes stay apart: a batch that is split over devices is no part of a row.
    grouped = lambda M: matmul(M[..., None], ones(1, channels // M.shape[-1])).reshape(*M.shape[:-1], channels)
    total = lambda a: matmul(ones(1, N), a.reshape(N, -1)).reshape(a.shape[1:])
    h = h.transpose(2, 0, 1)
    moving, standing = _by_motion(length, B=B, C=C)
    tokens = {name: M.transpose(1, 3, 0, 2) for name, M in moving.items()}  # `T N B G`
    tokens |= {"x": x.swapaxes(0, 1), "dt": dt.swapaxes(0, 1), "keep": keep.T[:, None, :, None]}
    # What stands still adds its gradient up over time as it is, and over sequences once.
    standing = {name: jnp.broadcast_to(grouped(M.transpose(1, 3, 0, 2)[0]), h.shape) for name, M in standing.items()}
    A = jnp.broadcast_to(A.T[:, None], h.shape)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(h, token):
        B, C = (standing[name] if name in standing else grouped(token[name]) for name in ("B", "C"))
        h = affine.act(_element(spread(token["x"]), spread(token["dt"]), token["keep"], A, B), h)
        return h, total(h * C)

    h, y = lax.scan(step, h, tokens)
    return y.swapaxes(0, 1), h.transpose(1, 2, 0)


def chunked(x, dt, keep, A, B, C, h, chunk_size, inside=None):
    """One chunk at a time; the backward pass keeps a state a chunk and makes the states of a chunk again."""
    length = x.shape[1]
    moving, standing = _by_motion(length, B=B, C=C)
    forms: dict[str, Callable] = {"in_rows": in_rows, "parallel": partial(parallel, None)}
    form = inside or dispatch("selective_scan", None, forms, {"cpu": "in_rows", "default": "parallel"})

    @jax.checkpoint
    def step(h, chunk):
        terms = {"A": A} | chunk | standing
        y, h = form(*(terms[name] for name in ("x", "dt", "keep", "A", "B", "C")), h)
        return h, y

    keep = jnp.pad(keep, ((0, 0), (0, -length % chunk_size)), constant_values=1)  # keep = 1, dt = 0 change no state
    h, y = lax.scan(step, h, scan.split_chunks({"x": x, "dt": dt, "keep": keep} | moving, chunk_size))
    return scan.join_chunks(y, length), h


def _by_motion(length: int, **terms):
    """Those that move with time, and those that stand still."""
    moves = lambda M: M.shape[1] == length
    return {n: M for n, M in terms.items() if moves(M)}, {n: M for n, M in terms.items() if not moves(M)}


def wide(form):
    """The form on terms in the precision of the state, which a kernel reads as they are."""

    def run(x, dt, keep, A, B, C, h):
        return form(x.astype(keep.dtype), dt.astype(keep.dtype), keep, A, B.astype(A.dtype), C.astype(A.dtype), h)

    return run


def in_kernel(x, dt, keep, A, B, C, h, restarts: bool):
    """States `N D`, channels along the lanes, which share B and C. Processors know powers of two best."""
    if any(map(jnp.iscomplexobj, (A, B, C))) or B.shape[1:3] != (x.shape[1], 1) or C.shape[1:3] != (x.shape[1], 1):
        raise NotImplementedError(
            f"impl='pallas' of selective_scan takes a real A, and B and C `B T N`; A is {A.dtype}, B {B.shape} and C "
            f"{C.shape}. Choose None, 'sequential', 'in_rows', 'parallel' or 'chunked'."
        )
    N = A.shape[1]
    filled = lambda M: jnp.pad(M, [(0, 0)] * (M.ndim - 1) + [(0, (1 << (N - 1).bit_length()) - N)])
    A, B, C, h = (filled(M) for M in (A, B[:, :, 0], C[:, :, 0], h))  # states that stay zero
    state = {"h": h.swapaxes(1, 2)}
    flags = {"keep": keep[..., None]} if restarts else {}
    inputs = Inputs(state, {"x": x, "dt": dt}, {"B": B, "C": C}, {"A": A.T / log(2)}, flags)
    state, out = tokenwise(_token, ("y",), inputs, {"keep": 1})
    return out["y"], state["h"].swapaxes(1, 2)[..., :N]


def _token(h, fixed, row):
    left = h["h"] * row["keep"] if "keep" in row else h["h"]
    h = jnp.exp2(row["dt"] * fixed["A"]) * left + row["B"].T * (row["dt"] * row["x"])
    return {"h": h}, {"y": jnp.sum(row["C"].T * h, axis=0, keepdims=True)}


@typed
def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Inexact[Array, "D N"],
    B: Inexact[Array, "B T N"] | Inexact[Array, "B T G N"] | Inexact[Array, "D N"],
    C: Inexact[Array, "B T N"] | Inexact[Array, "B T G N"] | Inexact[Array, "D N"],
    D: Float[Array, "D"] | None = None,
    *,
    initial_state: Inexact[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int = 64,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
    """The selective state space recurrence of Mamba (arXiv 2312.00752, algorithm 2), with Euler's rule for B.

        h_t = exp(dt_t A) ⊙ h_{t-1} + (dt_t x_t) B_tᵀ        y_t = h_t C_t + D ⊙ x_t

    `dt` is already positive. B and C move with time (`B T N`, or `B T G N` where each of G groups serves D/G
    consecutive channels) or stand still, one row a channel (`D N`). A complex A stands for conjugate pairs:
    y_t = 2 Re(h_t C_t) + D ⊙ x_t. `initial_state` is h_0, zeros when None; a change of `segment_ids` restarts from
    zero. Sums and the final state are at least float32. `chunked` keeps one state a chunk for the gradient.

    Raises:
      ValueError: shapes disagree, the groups do not divide D, T = 0, or chunk_size < 1.
      NotImplementedError: `impl` is none of the forms.
    """
    batch, length, channels = x.shape
    if length == 0 or chunk_size < 1:
        raise ValueError(f"x has shape {x.shape} and chunk_size={chunk_size}; selective_scan takes 1 or more of each.")
    real = accumulator(x.dtype)
    state_dtype = promoted(A.dtype, real)
    groups = {2: lambda M: M[None, None], 3: lambda M: M[:, :, None], 4: lambda M: M}
    B, C = (groups[M.ndim](M) for M in (B, C))
    for name, M in (("B", B), ("C", C)):
        if channels % M.shape[2]:
            raise ValueError(f"{name} has {M.shape[2]} groups, which do not divide the {channels} channels of x.")
    keep = jnp.ones((batch, length), real) if segment_ids is None else 1 - segment_starts(segment_ids).astype(real)
    shape = (batch, channels, A.shape[1])
    h = zeros_from(x, shape, state_dtype, plus=initial_state)
    forms: dict[str, Callable] = {
        "sequential": wide(sequential),
        "in_rows": wide(in_rows),
        "parallel": wide(partial(parallel, "parallel")),
        "chunked": wide(partial(chunked, chunk_size=min(chunk_size, length))),
        "pallas": partial(in_kernel, restarts=segment_ids is not None),
    }
    # A processor with few lanes loops fastest over time, but would have to keep every state for the gradient.
    best = {"cpu": "in_rows", "default": "chunked"} if length > 1 else "parallel"  # whose state stays as it lies
    h, *tokens = own((h, x, dt, keep, A.astype(state_dtype), B, C))
    run = partial(dispatch("selective_scan", impl, forms, best, "chunked"), *tokens)
    total = lambda: Affine(_total_decay(*tokens[1:4]), run(jnp.zeros_like(h))[1])
    y, final = across_devices(affine, total, run, h)
    y = 2 * y.real if jnp.iscomplexobj(y) else y
    y = y if D is None else y + D.astype(real)[None, None] * x.astype(real)
    return y.astype(x.dtype), final


def _total_decay(dt, keep, A):
    """What all tokens together leave of a state: nothing, where one of them restarts."""
    dt, keep = (x.astype(A.dtype) for x in (jnp.sum(dt.astype(keep.dtype), 1), jnp.min(keep, 1)))
    return jnp.exp(dt[..., None] * A[None]) * keep[:, None, None]
