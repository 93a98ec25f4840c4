"""S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t: linear attention with decay."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import lax

from .. import scan
from ..exact import einsum
from ..monoid import OuterProduct, outer_product
from ..shapes import Array, Float, Int, promoted, typed, zeros_from
from ..sharded import across_devices, own
from .chunkwise import Chunk, Roles, chunks, chunkwise
from .dispatch import dispatch
from .matrix_state import advanced, arguments, best, delayed, in_accumulator, per_head, unless_restart
from .one_token import one_token
from .within_chunk import product

# The forms take queries and keys `B T H K` (the last two forms of fewer heads too), values `B T H V`, log decays
# `B T H K` or `B T H 1`, and a float32 state `B H K V`. With decays of values `B T H V` keys and values change places,
# the state is Sᵀ, and a query reads along its other axis.

BY_KEY, BY_VALUE = "...kv,...k->...v", "...kv,...v->...k"


def sequential(q, k, v, g, S, read=BY_KEY):
    def step(S, token):
        q, k, v, g = token
        S = jnp.exp(g)[..., None] * S + k[..., None] * v[..., None, :]
        return S, einsum(read, S, q)

    return scan.loop(step, S, (q, k, v, g))


def parallel(q, k, v, g, S, read=BY_KEY):
    """The scan of the monoid itself: it keeps every state, T·K·V numbers a head."""
    elements = OuterProduct.from_token(jnp.broadcast_to(g, k.shape), k, v)
    states, final = scan.parallel(outer_product, elements, S)
    return einsum(read, states, q), final


def chunked(q, k, v, g, S, decays="key", *, place):
    """Matrix products inside chunks, one state between them; the backward pass recomputes each chunk.

    What decays: keys, values (in the place of keys), or with one decay of a whole "head" values as well as keys. Then
    nothing has to be prepared, and rows of values are decayed and not those of keys: that pays where they are no wider.
    """
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    if decays == "key":
        chunk, roles = Chunk(dtype, _prepare, _through, pairs=("A",)), Roles(reads=("q",), writes=("k",))
        return chunkwise(chunk, roles, place, {"q": q, "k": k, "v": v}, g, S)
    chunk = Chunk(dtype, _prepare_by_value, _by_value, beforehand=False)
    roles = Roles(writes=("v",), outputs=True, columns=("q", "k"))
    if decays == "value":
        return chunkwise(chunk, roles, place, {"q": q, "k": v, "v": k}, g, S)
    o, S = chunkwise(chunk, roles, place, {"q": q, "k": k, "v": v}, g, S.swapaxes(2, 3))
    return o, S.swapaxes(2, 3)


def _prepare(dtype, within, rows, decays):
    """A_ij = q_i · e^{G_i − G_j} ⊙ k_j of j ≤ i"""
    q, k = rows["q"], rows["k"]
    (A,) = within.scores((q,), (k,), decays, dtype)
    A += within.diagonal_matrix(within.diagonal(q, k))
    return {"A": A, "q": decays.from_start * q, "k": decays.to_end * k}


def _through(dtype, within, columns, prepared, total, S):
    """o_i = (e^{G_i} ⊙ q_i) S + Σ_{j≤i} A_ij v_j"""
    v = columns["v"]
    o = within.product("...ij,...jv->...iv", prepared["A"], v, dtype)
    o += within.product("...ik,...kv->...iv", prepared["q"], S, dtype)
    return o, total * S + within.product("...ik,...iv->...kv", prepared["k"], v, dtype)


def _prepare_by_value(dtype, within, rows, decays):
    """Not beforehand: decays between pairs of tokens are no array `C W`."""
    return {"v": decays.to_end * rows["v"], "raw": rows["v"], "decays": decays}


def _by_value(dtype, within, columns, prepared, total, S):
    """o_i = e^{G_i} ⊙ S q_i + Σ_{j≤i} (q_i · k_j) e^{G_i − G_j} ⊙ v_j, with the state transposed."""
    q, k, v, decays = columns["q"], columns["k"], prepared["raw"], prepared["decays"]
    weights = within.product("...ik,...jk->...ij", q, k, dtype)
    o = decays.from_start * within.product("...ik,...vk->...iv", q, S, dtype)
    o += within.decayed_values(weights, v, decays, dtype)
    return o, total * S + within.product("...iv,...ik->...vk", prepared["v"], k, dtype)


def single(q, k, v, g, S, read=BY_KEY):
    if read == BY_KEY:
        return one_token(_token, S, {"q": q, "k": k, "g": g}, {"v": v})
    o, after = one_token(_token, S.swapaxes(2, 3), {"q": q, "k": v}, {"v": k, "g": g})
    return o, after.swapaxes(2, 3)


def _token(S, of):
    S = jnp.exp(of["g"]) * S + of["k"] * of["v"]
    return S, jnp.sum(of["q"] * S, axis=-2, keepdims=True)


def with_bonus(form, bonus, q, k, v, g, S):
    """o_t = S_{t-1}ᵀ q_t + (q_t · (u ⊙ k_t)) v_t: the form read one step late, and what the bonus adds."""
    early = unless_restart(q, g)
    o, final = form(advanced(early, 1), k, v, g, S)
    first = einsum("bhkv,bhk->bhv", S, early[:, 0].astype(S.dtype))[:, None]
    q, k, v, bonus = (x.astype(S.dtype) for x in (q, k, v, bonus))
    return delayed(o.astype(S.dtype), 1, first) + jnp.sum(q * bonus * k, axis=-1, keepdims=True) * v, final


@typed
def gated_linear_attention(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T _ _"] | Float[Array, "B T _"] | Float[Array, "H"] | None = None,
    *,
    decay_axis: Literal["key", "value"] = "key",
    bonus: Float[Array, "H K"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention whose matrix state decays, by a gate per key channel, per head, or not at all.

        S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t        (GLA, arXiv 2312.06635, eq. 3)

    `log_decay` g is a natural log, ≤ 0: per channel `B T H K` (GLA), per head `B T H` (Mamba-2, mLSTM), fixed `H`
    (RetNet), or None. With `bonus` u, o_t reads S_{t-1} + (u ⊙ k_t) v_tᵀ instead (RWKV-6). `scale` is K^-½ when
    None. With `decay_axis` "value" a decay `B T H V` is per value channel: S_t = S_{t-1} diag(exp g_t) + k_t v_tᵀ (GSA,
    arXiv 2409.07146). Fewer query and key heads than value heads each serve a run of consecutive value heads.
    `initial_state` is S_0, zeros when None; a change of `segment_ids` restarts from zero, as a log decay of −∞ does: a
    bonus reads nothing across it. The final state is S_T, at least float32.
    `chunked` costs O(T C (K + V) + T K V) a head, keeps one state a chunk, and is exact for any log decay ≤ 0; errors
    in the gradient of log decays are rounding of the largest of the other gradients.

    Raises:
      ValueError: shapes disagree, T = 0, chunk_size < 1, a log decay is known to be above 0, `decay_axis` is none of
        the two, or there is a bonus beside decays of values.
      NotImplementedError: `impl` is none of the forms.
    """
    length = value.shape[1]
    q, k, g, S = arguments(
        "gated_linear_attention", query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size
    )
    if decay_axis not in ("key", "value"):
        raise ValueError(f"decay_axis={decay_axis!r}; gated_linear_attention takes 'key' or 'value'.")
    by_value = decay_axis == "value" and g.shape[-1] > 1
    channels = (value if decay_axis == "value" else key).shape[-1]
    if g.shape[-1] not in (1, channels):
        raise ValueError(f"log_decay has {g.shape[-1]} channels; beside decay_axis={decay_axis!r} it takes {channels}.")
    if by_value and bonus is not None:
        raise ValueError("bonus and decay_axis='value' are both given; choose one.")
    v, read = own(value), BY_VALUE if by_value else BY_KEY
    k, v, S = (v, k, S.swapaxes(2, 3)) if by_value else (k, v, S)
    by_head = g.shape[-1] == 1 and value.shape[3] <= key.shape[3]
    decays = "value" if by_value else "head" if by_head else "key"
    table = f"gated_linear_attention_by_{decays}"
    forms = {
        "sequential": in_accumulator(partial(sequential, read=read), S),
        "parallel": in_accumulator(partial(parallel, read=read), S),
        **chunks(table, partial(chunked, decays=decays), partial(single, read=read), length, chunk_size),
    }
    form = dispatch("gated_linear_attention", impl, forms, *best(length))
    if bonus is not None:
        q, k = (per_head(x, value.shape[2]) for x in (q, k))
        form = partial(with_bonus, form, own(zeros_from(value, bonus.shape, bonus.dtype, plus=bonus)[None, None]))
    o, final = across_devices(outer_product, partial(_total, k, v, g), partial(form, q, k, v, g), S)
    return o.astype(value.dtype), final.swapaxes(2, 3) if by_value else final


def _total(k, v, g) -> OuterProduct:
    """All tokens as one element: each key decayed to the end."""
    k, v = (per_head(x, g.shape[2]) for x in (k, v))
    to_end = lax.cumsum(g, axis=1, reverse=True)
    later = jnp.pad(to_end[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return OuterProduct(to_end[:, 0], product("bthk,bthv->bhkv", jnp.exp(later) * k.astype(g.dtype), v, g.dtype))
