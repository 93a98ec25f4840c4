"""o_t = Σ_ℓ λ_t^ℓ S_t^ℓᵀ q_t: linear attention that tells recent tokens from old ones by a number of states log T."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..exact import einsum
from ..monoid import Runs, Segmented, runs, segmented
from ..segments import segment_starts, tokens_so_far
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from ..sharded import across_devices, own
from .dispatch import dispatch
from .matrix_state import check_inputs, per_head
from .within_chunk import decays_of

# The forms take queries and keys `B T H K`, values `B T H V`, scales `B T H L`, log decays `B T H`; of every token
# whether it starts a segment and its place in it, `B T`; and sums `B H M K V`, M = L − 1.


class LogLinearState(NamedTuple):
    """Of the n tokens so far: the sums of k vᵀ over runs of 1, 2, 4 … tokens, one for each bit of n that is set.

    The run of the lowest bit is the latest one. The last sum takes what is older too.
    """

    sums: Float[Array, "B H M K V"]
    tokens: Int[Array, "B"]


RUNS = segmented(runs)


def _element(k, v, g, starts, places, bits: int) -> Segmented:
    """A token is a run of one: as the counter counts on, it and the lower runs become that of the bit that is set."""
    carried = _highest(places ^ (places + 1), bits)
    sums = jax.nn.one_hot(carried, bits, dtype=k.dtype)[..., None, :, None] * _outer(k, v)[..., None, :]
    return Segmented(starts, Runs(jnp.exp(g), jnp.broadcast_to(carried[..., None], g.shape), sums))


def _outer(k, v):
    """`… K V` in one axis."""
    return (k[..., None] * v[..., None, :]).reshape(*k.shape[:-1], -1)


def _highest(n, bits: int):
    """The highest bit that is set, one of the first `bits`; −1 for none."""
    return jnp.minimum(31 - lax.clz(n), bits - 1)


def _read(q, k, v, scales, g, starts, sums):
    """Of a token itself, and of the sums before it."""
    sums = jnp.where(starts[..., None, None, None], 0, jnp.exp(g)[..., None, None] * sums)
    known = jnp.concatenate([_outer(k, v)[..., None, :], sums], axis=-2).reshape(*scales.shape, k.shape[-1], -1)
    return einsum("...l,...k,...lkv->...v", scales, q, known)


def sequential(q, k, v, scales, g, starts, places, S):
    def step(S, token):
        q, k, v, scales, g, starts, places = token
        o = _read(q, k, v, scales, g, starts, S)
        return RUNS.act(_element(k, v, g, starts, places, S.shape[-2]), S), o

    o, final = scan.loop(step, S.reshape(*S.shape[:3], -1), (q, k, v, scales, g, starts, places))
    return o, final.reshape(S.shape)


def parallel(q, k, v, scales, g, starts, places, S):
    """The scan of the monoid itself: it keeps the sums at every token."""
    flat = S.reshape(*S.shape[:3], -1)
    sums, final = scan.parallel(RUNS, _element(k, v, g, starts, places, S.shape[2]), flat)
    before = jnp.concatenate([flat[:, None], sums[:, :-1]], axis=1)
    return _read(q, k, v, scales, g, starts, before), final.reshape(S.shape)


def chunked(q, k, v, scales, g, starts, places, S, *, chunk_size: int):
    """All pairs inside a chunk, and every sum read by all of it; chunks one after the other."""
    tokens, whole = (q, k, v, scales, g, starts, places), g.shape[1] // chunk_size * chunk_size
    outputs = []
    if whole:
        chunks = scan.split_chunks(jax.tree.map(lambda x: x[:, :whole], tokens), chunk_size)
        S, o = lax.scan(_chunk, S, chunks)
        outputs.append(scan.join_chunks(o, whole))
    if whole < g.shape[1]:
        S, o = _chunk(S, jax.tree.map(lambda x: x[:, whole:], tokens))
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1), S


@jax.checkpoint
def _chunk(S, tokens):
    q, k, v, scales, g, starts, places = tokens
    bits, ids = S.shape[2], jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    decays, chosen = decays_of(g.swapaxes(1, 2)[..., None]), partial(jax.nn.one_hot, dtype=S.dtype)
    by_time = lambda x: x[..., 0].swapaxes(1, 2)
    pairwise: Any = decays.pairwise  # of a decay a head
    # Token j is in the run of the highest bit in which its place differs from that of the reader.
    level = 1 + _highest(places[:, :, None] ^ places[:, None], bits)
    seen = jnp.tril(jnp.ones(level.shape[1:], bool))[None] & (ids[:, :, None] == ids[:, None])
    decayed = jnp.where(seen[:, None], pairwise + jnp.eye(level.shape[-1], dtype=S.dtype)[None, None], 0)
    scores = einsum("bihk,bjhk->bhij", q, k) * decayed
    o = einsum("bhij,bijl,bihl,bjhv->bihv", scores, chosen(level, bits + 1), scales, v)
    # A run before the chunk, where places go on from the first one's, is what it is until a higher bit than its own
    # changes.
    bit = jnp.arange(bits, dtype=places.dtype)[None, None]
    changed = lambda n: _highest(n ^ places[:, :1], bits)[..., None]
    now = lambda n, ids: jnp.where((ids == 0)[..., None, None], chosen(jnp.maximum(bit, changed(n)), bits), 0)
    old = einsum("btml,bthl->btmh", now(places, ids), scales[..., 1:])
    old *= by_time(decays.from_start)[:, :, None]
    o += einsum("bthk,bhmkv,btmh->bthv", q, S, old)
    after = places[:, -1:] + 1
    to_end = (ids == ids[:, -1:]).astype(S.dtype)[..., None] * by_time(decays.to_end)
    added = einsum("btl,bth,bthk,bthv->bhlkv", chosen(_highest(after ^ places, bits), bits), to_end, k, v)
    kept = decays.total[..., None] * S
    return einsum("bml,bhmkv->bhlkv", now(after, ids[:, -1:])[:, 0], kept) + added, o


@typed
def log_linear_attention(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    level_scales: Float[Array, "B T H L"],
    log_decay: Float[Array, "B T H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: LogLinearState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], LogLinearState]:
    """Linear attention that weighs tokens by how far back they lie, in a Fenwick tree of runs (arXiv 2506.04761).

        o_t = scale · Σ_{s ≤ t} exp(Σ_{s<u≤t} g_u) λ_t[ℓ(t, s)] (q_t·k_s) v_s
        ℓ(t, t) = 0        ℓ(t, s) = 1 + the highest bit in which t and s differ

    Places t count from the start of a segment. `level_scales` λ are of L levels, 2 or more: the last is of all tokens
    older than 2^(L−2) too. `log_decay` g, natural logs ≤ 0, is zero when None; `scale` is K^-½ when None. Key heads
    serve runs of value heads. The state is (L − 1) K V numbers a head in at least float32, and a count. `chunked`, in
    chunks of 64 when `chunk_size` is None, costs O(T (C + L K)) a channel of the values.

    Raises:
      ValueError: shapes disagree, T = 0, L < 2, chunk_size < 1, or a log decay is known to be above 0.
      NotImplementedError: `impl` is none of the forms.
    """
    (batch, length, heads, V), K, levels = value.shape, key.shape[-1], level_scales.shape[-1]
    check_inputs("log_linear_attention", query, key, value, log_decay, chunk_size)
    if levels < 2:
        raise ValueError(f"level_scales has {levels} levels; log_linear_attention takes 2 or more.")
    dtype = accumulator(value.dtype)
    sums, before = (batch, heads, levels - 1, K, V), initial_state
    if before is not None and before.sums.shape != sums:
        raise ValueError(f"initial_state has sums {before.sums.shape}; {sums} fit the inputs.")
    S = zeros_from(value, sums, dtype, plus=None if before is None else before.sums)
    count = zeros_from(value, (batch,), jnp.int32, plus=None if before is None else before.tokens)
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)
    so_far, count = tokens_so_far(starts, count)
    q = query * jnp.asarray(K**-0.5 if scale is None else scale, query.dtype)
    g = jnp.zeros(value.shape[:3], dtype) if log_decay is None else log_decay
    tokens = (x.astype(dtype) for x in (per_head(q, heads), per_head(key, heads), value, level_scales, g))
    tokens = own((*tokens, starts, so_far - 1))
    forms: dict[str, Callable] = {
        "sequential": sequential,
        "parallel": parallel,
        "chunked": partial(chunked, chunk_size=min(length, chunk_size or 64)),
    }
    form = dispatch("log_linear_attention", impl, forms, "chunked" if length > 1 else "sequential")

    def total():
        *_, g, starts, places = tokens
        alone = form(*tokens, jnp.zeros_like(S))[1].reshape(*sums[:3], -1)
        carried = _highest(places ^ (places + 1), levels - 1).max(axis=1)
        carried = jnp.broadcast_to(carried[:, None], sums[:2])
        return Segmented(starts.any(axis=1), Runs(jnp.exp(g.sum(axis=1)), carried, alone))

    flat = lambda S: S.reshape(*sums[:3], -1)

    def run(S):
        o, final = form(*tokens, S.reshape(sums))
        return o, flat(final)

    o, final = across_devices(RUNS, total, run, flat(S))
    return o.astype(value.dtype), LogLinearState(final.reshape(sums), count)
