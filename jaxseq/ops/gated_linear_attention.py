"""S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t: linear attention with decay."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..monoid import OuterProduct, outer_product
from ..segments import segment_starts
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from ..sharded import across_devices, own
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
    # Padding with zero keys and zero log decays changes no state.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk_size), (0, 0), (0, 0)))
    o, S = _chunked(chunk_size, *(pad(x) for x in (q, k, v, g)), bonus, S)
    return o[:, :length], S


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk_size, q, k, v, g, bonus, S):
    return _chunked_forward(chunk_size, q, k, v, g, bonus, S)[0]


def _chunked_forward(chunk_size, q, k, v, g, bonus, S):
    """Chunks are read and written where they stay: no copy of an array in another order."""

    def step(i, carry):
        S, o, states = carry
        tokens = tuple(_read(x, i, chunk_size) for x in (q, k, v, g))
        out, after = _chunk(tokens, bonus, S)
        return after, _write(o, out, i), lax.dynamic_update_index_in_dim(states, S, i, 0)

    chunks = q.shape[1] // chunk_size
    o, states = zeros_from(v, v.shape, S.dtype), zeros_from(v, (chunks, *S.shape), S.dtype)
    after, o, states = lax.fori_loop(0, chunks, step, (S, o, states))
    return (o, after), (q, k, v, g, bonus, states)


def _chunked_backward(chunk_size, residuals, cotangents):
    q, k, v, g, bonus, states = residuals
    d_o, d_S = cotangents

    def step(i, carry):
        i = states.shape[0] - 1 - i
        d_S, d_bonus, *adjoints = carry
        tokens = tuple(_read(x, i, chunk_size) for x in (q, k, v, g))
        S = lax.dynamic_index_in_dim(states, i, 0, keepdims=False)
        d_tokens, d_bonus_here, d_S = _chunk_backward(tokens, bonus, S, _read(d_o, i, chunk_size), d_S)
        d_bonus = None if bonus is None else d_bonus + d_bonus_here
        return d_S, d_bonus, *(_write(d, here, i) for d, here in zip(adjoints, d_tokens, strict=True))

    adjoints = (zeros_from(v, x.shape, x.dtype) for x in (q, k, v, g))
    d_bonus = None if bonus is None else zeros_from(v, bonus.shape, bonus.dtype)
    d_S, d_bonus, *adjoints = lax.fori_loop(0, states.shape[0], step, (d_S, d_bonus, *adjoints))
    return *adjoints, d_bonus, d_S


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _read(x, i, size):
    """Chunk i of `B T H …` as `B H C …`: heads before time, so that all products are batched ones."""
    return lax.dynamic_slice_in_dim(x, i * size, size, 1).swapaxes(1, 2)


def _write(x, chunk, i):
    chunk = chunk.swapaxes(1, 2).astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, chunk, i * chunk.shape[1], 1)


def _chunk(tokens, bonus, S):
    """One chunk, `B H C …`, from the state before it."""
    q, k, v, g = tokens
    levels, from_start, to_end, total = _decays(g, bonus is not None)
    scores = _scores(q, k, bonus, levels)[:, :, : q.shape[2], : q.shape[2]]
    o = _product("bhij,bhjv->bhiv", scores.astype(v.dtype), v)
    o += _product("bhik,bhkv->bhiv", _decayed(q, from_start), S.astype(q.dtype))
    return o, total.swapaxes(-1, -2) * S + _product("bhik,bhiv->bhkv", _decayed(k, to_end), v)


def _chunk_backward(tokens, bonus, S, d_o, d_after):
    """Products like the forward ones for q, k, v and S; and for the log decays, with S̄ the adjoint of S,

        ḡ_t = Σ_v exp(g_t) S_{t-1} ⊙ S̄_t = Σ_v S_t ⊙ S̄_t − k_t ⊙ k̄_t        Σ_v S_{t-1} ⊙ S̄_{t-1} = q_t ⊙ q̄_t + ḡ_t

    a sum from the end of the chunk, without the decays between any two tokens (GLA, arXiv 2312.06635, section 4.3).
    Its rounding error is that of q ⊙ q̄, also where strong decays leave a far smaller gradient.
    """
    q, k, v, g = tokens
    size, wide = q.shape[2], S.dtype
    levels, from_start, to_end, total = _decays(g, bonus is not None)
    keys, narrow_o, narrow_after = _decayed(k, to_end), d_o.astype(v.dtype), d_after.astype(v.dtype)
    d_scores = _product("bhiv,bhjv->bhij", narrow_o, v)
    d_v = _product("bhij,bhiv->bhjv", _scores(q, k, bonus, levels)[:, :, :size, :size].astype(v.dtype), narrow_o)
    d_v += _product("bhik,bhkv->bhiv", keys, narrow_after)
    d_q = from_start * _product("bhiv,bhkv->bhik", narrow_o, S.astype(v.dtype))
    d_k = to_end * _product("bhiv,bhkv->bhik", v, narrow_after)
    d_S = total.swapaxes(-1, -2) * d_after + _product("bhik,bhiv->bhkv", _decayed(q, from_start), narrow_o)
    cross_q, cross_k = _scores_backward(q, k, d_scores, levels)
    d_q, d_k = d_q + cross_q[:, :, :size], d_k + cross_k[:, :, :size]
    # The diagonal meets no decay, and enters after the sum for g.
    after = total.swapaxes(-1, -2) * S + _product("bhik,bhiv->bhkv", keys, v)
    end = jnp.sum(after * d_after, axis=-1)[:, :, None]
    read, written = (x.astype(wide) * d_x for x, d_x in ((q, d_q), (k, d_k)))
    read = read if bonus is None else jnp.pad(read[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
    later = jnp.triu(jnp.ones((size, size), wide))  # a product, since a cumulative sum leaves the fast path on CPU
    d_g = end + _product("ij,bhjk->bhik", later, read - written)
    d_g = d_g if g.shape[-1] == k.shape[-1] else jnp.sum(d_g, axis=-1, keepdims=True)
    d_diagonal = jnp.einsum("bhii->bhi", d_scores)[..., None]
    weight = 1 if bonus is None else bonus.swapaxes(1, 2).astype(wide)
    q, k = q.astype(wide), k.astype(wide)
    d_bonus = None if bonus is None else jnp.sum(d_diagonal * q * k, (0, 2))[None, None].astype(bonus.dtype)
    d_q, d_k = d_q + d_diagonal * weight * k, d_k + d_diagonal * weight * q
    return (d_q, d_k, d_v, d_g), d_bonus, d_S


def _product(equation, *operands):
    dtype = accumulator(*(x.dtype for x in operands))
    return jnp.einsum(equation, *operands, preferred_element_type=dtype)


def _decays(g, excluded):
    """Decays inside blocks that double in size, up to the chunk: to read from a block's start, to write to its end.

    Where two neighbours join, every later query meets every earlier key in one matrix product, the query decayed
    from the border and the key decayed to it. Decays are only ever multiplied, never divided or subtracted as logs,
    so all factors stay in [0, 1]: no overflow and no cancellation at any strength (GLA, arXiv 2312.06635, section
    4.3, takes a reference row a sub-block for the same end). `excluded`: with a bonus the query reads the state
    before its own token's decay (RWKV-6).
    """
    size = g.shape[2]
    whole = 1 << (size - 1).bit_length()
    g = jnp.pad(g, ((0, 0), (0, 0), (0, whole - size), (0, 0)))
    total = to_read = jnp.exp(g)
    to_end = jnp.ones_like(total)
    to_read = jnp.where(jnp.isneginf(g), 0, to_end) if excluded else to_read
    levels, block = [], 1
    while block < whole:
        read_early, read_late = _halves(to_read, block)
        end_early, end_late = _halves(to_end, block)
        total_early, total_late = _halves(total, 1)
        levels.append((read_late, end_early))
        to_read = _join(read_early, read_late * total_early)
        to_end = _join(end_early * total_late, end_late)
        total = (total_early * total_late)[..., 0, :]
        block *= 2
    return levels, to_read[:, :, :size], to_end[:, :, :size], total


def _scores(q, k, bonus, levels):
    """A_ij = q_i · (Π_{j<t≤i} decay_t ⊙ k_j) for j ≤ i, of the padded chunk."""
    wide = accumulator(q.dtype, k.dtype)
    diagonal = q.astype(wide) * k.astype(wide)
    diagonal = diagonal if bonus is None else diagonal * bonus.swapaxes(1, 2).astype(wide)
    q, k, diagonal = (_padded(x, levels) for x in (q, k, diagonal))
    scores = jnp.sum(diagonal, -1)[..., None, None]
    for i, (read, end) in enumerate(levels):
        queries, keys = _decayed(_halves(q, 1 << i)[1], read), _decayed(_halves(k, 1 << i)[0], end)
        cross = _product("...ik,...jk->...ij", queries, keys)
        early, late = scores[:, :, 0::2], scores[:, :, 1::2]
        scores = jnp.block([[early, jnp.zeros_like(cross)], [cross, late]])
    return scores[:, :, 0]


def _scores_backward(q, k, d_scores, levels):
    """The adjoints of q and k through the scores off the diagonal."""
    q, k = (_padded(x, levels) for x in (q, k))
    pad = q.shape[2] - d_scores.shape[-1]
    blocks = jnp.pad(d_scores, ((0, 0), (0, 0), (0, pad), (0, pad))).astype(q.dtype)[:, :, None]
    d_q, d_k = (jnp.zeros(x.shape, accumulator(x.dtype)) for x in (q, k))
    for i, (read, end) in reversed(list(enumerate(levels))):
        size = 1 << i
        cross = blocks[..., size:, :size]
        early, late = blocks[..., :size, :size], blocks[..., size:, size:]
        blocks = jnp.stack([early, late], axis=3).reshape(*q.shape[:2], -1, size, size)
        queries, keys = _decayed(_halves(q, size)[1], read), _decayed(_halves(k, size)[0], end)
        pairs = (*q.shape[:2], -1, 2, size, q.shape[-1])
        d_q = d_q.reshape(pairs).at[:, :, :, 1].add(read * _product("...ij,...jk->...ik", cross, keys))
        d_k = d_k.reshape(pairs).at[:, :, :, 0].add(end * _product("...ij,...ik->...jk", cross, queries))
    return d_q.reshape(q.shape), d_k.reshape(k.shape)


def _padded(x, levels):
    return jnp.pad(x, ((0, 0), (0, 0), (0, (1 << len(levels)) - x.shape[2]), (0, 0)))


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
    S_0, zeros when None; a change of `segment_ids` restarts from zero, as a log decay of −∞ does: a bonus reads
    nothing across it. The final state is S_T, at least float32.
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
    S = zeros_from(value, shape, dtype, plus=initial_state)
    g = zeros_from(value, g.shape, dtype, plus=g)
    bonus = None if bonus is None else zeros_from(value, bonus.shape, bonus.dtype, plus=bonus)[None, None]
    chunk_size = chunk_size or min(32, length)
    forms = {
        "sequential": _in_accumulator(sequential, dtype),
        "parallel": _in_accumulator(parallel, dtype),
        "chunked": partial(chunked, chunk_size=chunk_size),
    }
    # A processor with few lanes loops fastest over time, but would have to keep every state for the gradient.
    best = {"cpu": "sequential", "default": "chunked" if length > 1 else "sequential"}
    S, *tokens = own((S, q, k, value, g, bonus))
    run = partial(dispatch("gated_linear_attention", impl, forms, best, "chunked"), *tokens)
    o, final = across_devices(outer_product, partial(_total, *tokens[1:4]), run, S)
    return o.astype(value.dtype), final


def _total(k, v, g) -> OuterProduct:
    """All tokens as one element: each key decayed to the end."""
    to_end = lax.cumsum(g, axis=1, reverse=True)
    later = jnp.pad(to_end[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return OuterProduct(to_end[:, 0], _product("bthk,bthv->bhkv", _decayed(k, jnp.exp(later)), v))


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
