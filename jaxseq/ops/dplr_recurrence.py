"""S_t = (diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t: diagonal plus rank one."""

from functools import partial

import jax.numpy as jnp

from .. import scan
from ..exact import einsum
from ..monoid import MatrixMap, matrix_map
from ..shapes import Array, Float, Int, promoted, typed
from ..sharded import across_devices, own
from .chunkwise import Chunk, Roles, chunks, chunkwise
from .dispatch import dispatch
from .matrix_state import arguments, best, in_accumulator, per_head, total_map, unless_restart
from .one_token import one_token

# The forms take queries, keys, a and b `B T H K` (the last two forms of fewer heads too), values `B T H V`, log decays
# `B T H K` or `B T H 1`, and a float32 state `B H K V`.


def sequential(q, k, v, a, b, g, S):
    def step(S, token):
        q, k, v, a, b, g = token
        read = einsum("bhkv,bhk->bhv", S, a)
        S = jnp.exp(g)[..., None] * S + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        return S, einsum("bhkv,bhk->bhv", S, q)

    return scan.loop(step, S, (q, k, v, a, b, g))


def parallel(q, k, v, a, b, g, S):
    """The scan of the monoid itself: it keeps every transition, T·K·(K + V) numbers a head."""
    unit = jnp.eye(k.shape[-1], dtype=S.dtype)[None, None, None]
    transition = jnp.exp(g)[..., None] * unit + b[..., None] * a[..., None, :]
    states, final = scan.parallel(matrix_map, MatrixMap(transition, k[..., None] * v[..., None, :]), S)
    return einsum("bthkv,bthk->bthv", states, q), final


ROLES = Roles(reads=("q",), early_reads=("a",), writes=("k", "b"))


def chunked(q, k, v, a, b, g, S, *, place):
    tokens = {"q": q, "k": k, "v": v, "a": a, "b": b}
    dtype = promoted(*(x.dtype for x in tokens.values()))
    chunk = Chunk(dtype, _prepare, _through, pairs=("inverse", "ak", "qk", "qb"), finish=_finish, exact=("inverse",))
    return chunkwise(chunk, ROLES, place, tokens, g, S)


def _prepare(dtype, within, rows, decays):
    """What each read, by a and by q, has of each writing, by k and by b. Reads by a are late by a token: those of the
    next one are made after each token, and moved; those of pairs by `_finish`, which makes an inverse of A_ab, too."""
    q, k, a, b = (rows[name] for name in "qkab")
    ahead = within.advanced(a)
    readers, writers = (ahead, q), (k, b)
    A = within.scores(readers, writers, decays, dtype)
    own = [within.diagonal_matrix(within.diagonal(reader, writer)) for reader in readers for writer in writers]
    ak, ab, qk, qb = (before + now for before, now in zip(A, own, strict=True))
    decayed = {"q": decays.from_start * q, "a": within.delayed(decays.from_start * ahead, within.first(a))}
    decayed |= {"k": decays.to_end * k, "b": decays.to_end * b}
    return {"inverse": ab, "ak": ak, "qk": qk, "qb": qb} | decayed


def _finish(within, pairs):
    """Reads by a moved a token late, and of those of b (I − A_ab)⁻¹."""
    moved = {"inverse": within.inverse(-within.delayed(pairs["inverse"])), "ak": within.delayed(pairs["ak"])}
    return pairs | moved


def _through(dtype, within, columns, prepared, total, S):
    """All reads u of a at once, from the state before the chunk and from one another:

    u = (I − A_ab)⁻¹ (A_ak V + (a ⊙ e^E) S)
    """
    v = columns["v"]
    from_state = lambda x: within.product("...ik,...kv->...iv", x, S, dtype)
    from_chunk = lambda A, x, of=dtype: within.product("...ij,...jv->...iv", A, x, of)
    u = from_chunk(prepared["inverse"], from_chunk(prepared["ak"], v) + from_state(prepared["a"]), S.dtype)
    o, after = from_state(prepared["q"]), total * S
    for write, written, seen in (("k", v, "qk"), ("b", u, "qb")):
        o += from_chunk(prepared[seen], written)
        after += within.product("...ik,...iv->...kv", prepared[write], written, dtype)
    return o, after


def single(q, k, v, a, b, g, S):
    return one_token(_token, S, {"q": q, "k": k, "a": a, "b": b, "g": g}, {"v": v})


def _token(S, of):
    read = jnp.sum(of["a"] * S, axis=-2, keepdims=True)
    S = jnp.exp(of["g"]) * S + of["b"] * read + of["k"] * of["v"]
    return S, jnp.sum(of["q"] * S, axis=-2, keepdims=True)


@typed
def dplr_recurrence(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    a: Float[Array, "B T Hk K"],
    b: Float[Array, "B T Hk K"],
    log_decay: Float[Array, "B T _ K"] | Float[Array, "B T _"] | Float[Array, "H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A matrix state whose transition is diagonal plus rank one: a reads the state, b writes what was read.

        S_t = (diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t        (RWKV-7, 2503.14456)

    a reads the state before its decay. With b = −a ⊙ λ and 0 ≤ λ ≤ 1 for unit a and log decays from 0 to −e^−½, as
    in RWKV-7, states stay bounded; with other signs they may grow without bound. Log decays, heads, `scale`, states and
    segments are those of `gated_linear_attention`.

    Raises:
      ValueError: shapes disagree, T = 0, chunk_size < 1, or a log decay is known to be above 0.
      NotImplementedError: `impl` is none of the forms.
    """
    length, heads = value.shape[1:3]
    q, k, g, S = arguments(
        "dplr_recurrence", query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size
    )
    forms = {
        "sequential": in_accumulator(sequential, S),
        "parallel": in_accumulator(parallel, S),
        **chunks("dplr_recurrence", chunked, single, length, chunk_size),
    }
    form = dispatch("dplr_recurrence", impl, forms, *best(length))
    v, a, b = own((value, unless_restart(per_head(a, heads), g), b))
    run = lambda v, S: form(q, k, v, a, b, g, S)
    o, final = across_devices(matrix_map, lambda: total_map(run, v, S), partial(run, v), S)
    return o.astype(value.dtype), final
