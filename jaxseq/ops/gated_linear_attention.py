"""S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t: linear attention with decay."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..monoid import OuterProduct, outer_product, segment_starts
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from .dispatch import dispatch

# The forms take queries and keys `B T H K`, values `B T H V`, log decays `B T H K` or `B T H 1`, a bonus `1 1 H K`
# or None, and a float32 state `B H K V`.


def sequential(q, k, v, g, bonus, S):
    def step(S, token):
        q, k, v, g = token
        before = _unless_restart(S, g)
        S = jnp.exp(g)[..., None] * S + k[..., None] * v[..., None, :]
        read = S if bonus is None else before + (bonus[0] * k)[..., None] * v[..., None, :]
        return S, jnp.einsum("bhkv,bhk->bhv", read, q)

    S, o = lax.scan(step, S, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g)))
    return o.swapaxes(0, 1), S


def parallel(q, k, v, g, bonus, S):
    """The scan of the monoid itself: it keeps every state, T·K·V numbers a head."""
    elements = OuterProduct.from_token(jnp.broadcast_to(g, k.shape), k, v)
    states, final = scan.parallel(outer_product, elements, S)
    if bonus is not None:
        before = _unless_restart(jnp.concatenate([S[:, None], states[:, :-1]], axis=1), g)
        states = before + (bonus * k)[..., None] * v[..., None, :]
    return jnp.einsum("bthkv,bthk->bthv", states, q), final


def chunked(q, k, v, g, bonus, S, chunk_size):
    """Matrix products inside chunks, one state between them; the backward pass recomputes each chunk."""
    length = q.shape[1]

    @jax.checkpoint
    def step(S, chunk):
        # Heads before time, so that all products are batched matrix products.
        q, k, v, g = (x.swapaxes(1, 2) for x in chunk)
        o, S = _chunk(q, k, v, g, bonus, S)
        return S, o.swapaxes(1, 2)

    # Padding with zero keys and zero log decays changes no state.
    padded = [jnp.pad(x, ((0, 0), (0, -length % chunk_size), (0, 0), (0, 0))) for x in (q, k, v, g)]
    S, o = lax.scan(step, S, scan.split_chunks(tuple(padded), chunk_size))
    return scan.join_chunks(o)[:, :length], S


def _chunk(q, k, v, g, bonus, S):
    """One chunk, `B H C …`, from the state before it."""
    size = q.shape[2]
    whole = 1 << (size - 1).bit_length()
    q, k, v, g = (jnp.pad(x, ((0, 0), (0, 0), (0, whole - size), (0, 0))) for x in (q, k, v, g))
    scores, from_start, to_end, total = _decayed_scores(q, k, g, bonus)
    product = partial(jnp.einsum, preferred_element_type=S.dtype)
    o = product("bhij,bhjv->bhiv", scores.astype(v.dtype), v)
    o += product("bhik,bhkv->bhiv", _decayed(q, from_start), S.astype(q.dtype))
    S = total.swapaxes(-1, -2) * S + product("bhik,bhiv->bhkv", _decayed(k, to_end), v)
    return o[:, :, :size], S


def _decayed_scores(q, k, g, bonus):
    """A_ij = q_i · (Π_{j<t≤i} decay_t ⊙ k_j) for j ≤ i, and the decays from a chunk's start and to its end.

    Blocks double in size: where two neighbours join, every later query meets every earlier key in one matrix
    product, the query decayed from the border and the key decayed to it. Decays are only ever multiplied, never
    divided or subtracted as logs, so all factors stay in [0, 1]: no overflow and no cancellation at any strength
    (GLA, arXiv 2312.06635, section 4.3, takes a reference row a sub-block for the same end). With a bonus the query
    reads the state before its own token (RWKV-6).
    """
    size = q.shape[2]
    decay = total = jnp.exp(g)
    to_end = jnp.ones_like(decay)
    to_read = decay if bonus is None else jnp.where(jnp.isneginf(g), 0, to_end)
    diagonal = q.astype(decay.dtype) * k.astype(decay.dtype)
    diagonal = diagonal if bonus is None else diagonal * bonus.swapaxes(1, 2).astype(decay.dtype)
    scores = jnp.sum(diagonal, -1)[..., None, None]
    block = 1
    while block < size:
        read_early, read_late = _halves(to_read, block)
        end_early, end_late = _halves(to_end, block)
        total_early, total_late = _halves(total, 1)
        queries = _decayed(_halves(q, block)[1], read_late)
        keys = _decayed(_halves(k, block)[0], end_early)
        cross = jnp.einsum("...ik,...jk->...ij", queries, keys, preferred_element_type=decay.dtype)
        early, late = scores[:, :, 0::2], scores[:, :, 1::2]
        scores = jnp.block([[early, jnp.zeros_like(cross)], [cross, late]])
        to_read = _join(read_early, read_late * total_early)
        to_end = _join(end_early * total_late, end_late)
        total = (total_early * total_late)[..., 0, :]
        block *= 2
    return scores[:, :, 0], to_read, to_end, total


def _decayed(x, decay):
    """x ⊙ decay in the precision of the decay, kept in that of x."""
    return (x.astype(decay.dtype) * decay).astype(x.dtype)


def _unless_restart(S, g):
    """The state a token with a bonus reads, before its own decay: nothing, where that decay of zero is a restart."""
    return jnp.where(jnp.isneginf(g)[..., None], 0, S)


def _halves(x, block):
    """The earlier and the later block of every pair of neighbours: `B H C K` → two of `B H C/2b b K`."""
    pairs = x.reshape(*x.shape[:2], -1, 2, block, x.shape[-1])
    return pairs[:, :, :, 0], pairs[:, :, :, 1]


def _join(early, late):
    return jnp.stack([early, late], axis=3).reshape(*early.shape[:2], -1, early.shape[-1])


@typed
def gated_linear_attention(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T _ K"] | Float[Array, "B T _"] | Float[Array, "H"] | None = None,
    *,
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
    None. Fewer query and key heads than value heads each serve a run of consecutive value heads. `initial_state` is
    S_0, zeros when None; a change of `segment_ids` restarts from zero. The final state is S_T, at least float32.
    `chunked` costs O(T C (K + V) + T K V) a head, keeps one state a chunk, and is exact for any log decay ≤ 0.

    Raises:
      ValueError: shapes disagree, T = 0, or chunk_size < 1.
      NotImplementedError: `impl` is none of the forms.
    """
    (_, length, heads, _), width = value.shape, key.shape[-1]
    if length == 0:
        raise ValueError(f"query has shape {query.shape}; gated_linear_attention takes at least one step of time.")
    if heads % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which do not divide the {heads} of value.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; gated_linear_attention takes 1 or more.")
    dtype = accumulator(value.dtype)
    g = _per_channel(log_decay, value, key.shape[2], dtype)
    if segment_ids is not None:  # a decay of zero: what came before is forgotten, without any special case
        g = jnp.where(segment_starts(segment_ids)[:, :, None, None], -jnp.inf, g)
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
    q = q * jnp.asarray(width**-0.5 if scale is None else scale, q.dtype)
    shape = (value.shape[0], heads, width, value.shape[-1])
    S = zeros_from(value, shape, dtype)
    S = S if initial_state is None else S + initial_state.astype(dtype)
    bonus = None if bonus is None else bonus[None, None]
    chunk_size = chunk_size or min(32, length)
    forms = {
        "sequential": _in_accumulator(sequential, dtype),
        "parallel": _in_accumulator(parallel, dtype),
        "chunked": partial(chunked, chunk_size=chunk_size),
    }
    best = "chunked" if length > 1 else "sequential"
    o, final = dispatch("gated_linear_attention", impl, forms, best)(q, k, value, g, bonus, S)
    return o.astype(value.dtype), final


def _per_channel(log_decay, value, key_heads, dtype):
    """Log decays as `B T H K`, or `B T H 1` where all channels of a head share one."""
    batch, length, heads, _ = value.shape
    if log_decay is None:
        return jnp.zeros((batch, length, heads, 1), dtype)
    g = log_decay.astype(dtype)
    if g.ndim == 1:
        return jnp.broadcast_to(g[None, None, :, None], (batch, length, heads, 1))
    g = g if g.ndim == 4 else g[..., None]
    if g.shape[2] not in (heads, key_heads):
        raise ValueError(f"log_decay has {g.shape[2]} heads; value has {heads} and key has {key_heads}.")
    return jnp.repeat(g, heads // g.shape[2], axis=2)


def _in_accumulator(form, dtype):
    def wider(q, k, v, g, bonus, S):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        return form(q, k, v, g, None if bonus is None else bonus.astype(dtype), S)

    return wider
