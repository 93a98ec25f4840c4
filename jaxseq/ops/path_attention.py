"""o_i = Σ_j softmax_j(scale · q_iᵀ H_i ⋯ H_{j+1} k_j) v_j, H_u = I − β_u w_u w_uᵀ: tokens reflect what came before.

What lies between a key and a query is the transition of the delta rule, and a block of tokens is what a chunk is there.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..exact import einsum
from ..shapes import Array, Float, Int, accumulator, check_log_decay, typed
from ..sharded import check_whole
from .delta_rule import delta_rule
from .dispatch import dispatch
from .visibility import (
    NOWHERE,
    Fading,
    Rules,
    averaged,
    check_heads,
    check_lengths,
    check_segments,
    running_sum,
    visible,
)
from .within_chunk import inverse

# The forms take queries `B T G R K`, keys and values `B S G …`, reflections w `B T G K` and β `B T G 1` of the last T
# tokens, all in at least float32, and what `visibility.averaged` takes.


def sequential(q, k, v, w, beta, **seen):
    """Every token reflects the keys before it, and then reads."""
    place = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :, None, None]

    def step(keys, token):
        t, q, w, beta = token
        reflected = keys - (beta * w)[:, None] * jnp.sum(keys * w[:, None], axis=-1, keepdims=True)
        keys = jnp.where(place < t, reflected, keys)
        return keys, einsum("bgrk,bsgk->bgrs", q, keys)

    t = jnp.arange(k.shape[1] - q.shape[1], k.shape[1], dtype=jnp.int32)
    _, logits = lax.scan(step, k, (t, *(x.swapaxes(0, 1) for x in (q, w, beta))))
    return averaged(jnp.moveaxis(logits, 0, 3), v, **seen)


def parallel(q, k, v, w, beta, **seen):
    """One block of all tokens: T·S logits, and as many numbers again, a head."""
    past = k.shape[1] - q.shape[1]
    q, own, w, beta = (jnp.moveaxis(x, 1, -2) for x in (q, k[:, past:], w, beta))
    logits, q, _, _ = _block(q, own, w, beta)
    before = einsum("bgrtk,bsgk->bgrts", q, k[:, :past])
    return averaged(jnp.concatenate([before, logits], axis=-1), v, **seen)


def chunked(q, k, v, w, beta, *, positions, segments, fading, rules, chunk_size):
    """A block of queries at a time, recomputed in the backward pass: C·S logits a head.

    Keys are reflected to the end of their block, queries to the start of theirs and from there back, block by block.
    """
    (batch, length, *heads, _), past = q.shape, k.shape[1] - q.shape[1]
    front, end = -past % chunk_size, -length % chunk_size

    def filled(x, before=0, axis=1, value=0):
        widths = [(before, end) if i == axis else (0, 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    def blocks(x):
        """`B n·C … K` → `n B … C K`."""
        return jnp.moveaxis(x.reshape(batch, -1, chunk_size, *x.shape[2:]), (1, 2), (0, -2))

    q, k, w, beta = (blocks(filled(x, before)) for x, before in ((q, 0), (k, front), (w, 0), (beta, 0)))
    v, first = filled(v, front), len(k) - len(q)
    own, q, reflected, y = _block(q, k[first:], w, beta)
    k = k.at[first:].set(reflected)
    w, y = (jnp.zeros_like(k).at[first:].set(x) for x in (w, y))  # older keys are past all reflections
    positions = filled(positions[0], 0, 0, NOWHERE), filled(positions[1], front, 0, NOWHERE)
    segments = segments and (filled(segments[0]), filled(segments[1], front, value=-1))
    fading = fading and (jax.tree.map(filled, fading[0]), jax.tree.map(partial(filled, before=front), fading[1]))

    @jax.checkpoint
    def block(n):
        def back(q, of):
            j, k, w, y = of
            logits, along = (einsum("bgrik,bgjk->bgrij", q, x) for x in (k, w))
            return jnp.where(j < first + n, q - einsum("bgrij,bgjk->bgrik", along, y), q), logits

        _, logits = lax.scan(back, q[n], (jnp.arange(len(k), dtype=jnp.int32), k, w, y), reverse=True)
        logits = lax.dynamic_update_index_in_dim(logits, own[n], first + n, 0)
        logits = jnp.moveaxis(logits, 0, -2).reshape(batch, *heads, chunk_size, -1)
        here = lambda x, axis=1: lax.dynamic_slice_in_dim(x, n * chunk_size, chunk_size, axis)
        queries = lambda pair: pair and (jax.tree.map(here, pair[0]), pair[1])
        at = here(positions[0], 0), positions[1]
        return averaged(logits, v, at, queries(segments), queries(fading), rules)

    o = lax.map(block, jnp.arange(len(q), dtype=jnp.int32))
    return o.swapaxes(0, 1).reshape(batch, -1, *o.shape[3:])[:, :length]


def _block(q, k, w, beta):
    """Of a block of tokens, queries `… R C K`, all else `… C K|1`: the logits inside it, `… R C C`, queries reflected
    to its start, keys to its end, and y of its reflections as one, H_C ⋯ H_1 = I − wᵀ y:

        y_u = β_u (w_u − Σ_{u'<u} (w_u·w_u') y_u')        q_iᵀ H_i ⋯ H_{j+1} k_j = q_i·k_j − Σ_{j<u≤i} (q_i·w_u) z_uj

    where z_uj is y_u·k_j with the sum from j on: as y, of the same triangular system (PaTH, arXiv 2505.16381).
    """
    dot = partial(einsum, "...ik,...jk->...ij")
    times = partial(einsum, "...ij,...jk->...ik")
    solve = inverse(jnp.tril(beta * dot(w, w), -1))
    y, z = times(solve, beta * w), times(solve, jnp.tril(beta * dot(w, k), -1))
    of_all = lambda x: x[..., None, :, :]  # query heads
    read = jnp.tril(dot(q, of_all(w)))
    logits = dot(q, of_all(k)) - times(read, of_all(z))
    return logits, q - times(read, of_all(y)), k - einsum("...uj,...uk->...jk", z, w), y


@typed
def path_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    direction: Float[Array, "B T G K"],
    beta: Float[Array, "B T G"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    log_decay: Float[Array, "B S H"] | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention whose positions are the path between key and query: a product of reflections.

        o_i = Σ_j a_ij v_j        a_ij = softmax_j(scale · q_iᵀ H_i ⋯ H_{j+1} k_j + Σ_{j<u≤i} g_u)
        H_u = I − β_u w_u w_uᵀ        (PaTH, arXiv 2505.16381)

    w is `direction`, used as given, β is `beta`: with unit w and β between 0 and 2 no key grows. With more keys
    than queries the first S − T are as `reflected_keys` left them. Heads, segments, `log_decay` g and `scale` are those
    of `softmax_attention`. `chunked` costs O(T S (K + V)) and keeps C·S logits a head.

    Raises:
      ValueError: shapes disagree, G does not divide H, T > S, chunk_size < 1, segments of queries alone, or a log decay
        known to be above 0.
      NotImplementedError: `impl` is none of the forms, or time is split over devices.
    """
    check_whole("path_attention", "give every device whole sequences")
    (batch, length, heads, width), (_, span, groups, _) = query.shape, key.shape
    check_heads(key, heads)
    check_lengths("path_attention", length, span)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; path_attention takes 1 or more.")
    check_segments(segment_ids, key_segment_ids, length, span)
    check_log_decay(log_decay, "path_attention")
    wide = accumulator(value.dtype)
    q = query.astype(wide) * jnp.asarray(width**-0.5 if scale is None else scale, wide)
    q = q.reshape(batch, length, groups, heads // groups, width)
    k, v, w, beta = (x.astype(wide) for x in (key, value, direction, beta[..., None]))
    key_segments = segment_ids if key_segment_ids is None else key_segment_ids
    fading = None
    if log_decay is not None:
        total = running_sum(log_decay.reshape(batch, span, groups, -1).astype(wide), across=False)
        fading = Fading(jax.tree.map(lambda x: x[:, span - length :], total), None), Fading(total, None)
    seen = dict(
        positions=(jnp.arange(span - length, span, dtype=jnp.int32), jnp.arange(span, dtype=jnp.int32)),
        segments=None if segment_ids is None else (segment_ids, key_segments),
        fading=fading,
        rules=Rules(partial(visible, True, None, 0)),
    )
    forms = {
        "sequential": partial(sequential, **seen),
        "parallel": partial(parallel, **seen),
        "chunked": partial(chunked, **seen, chunk_size=min(chunk_size, length)),
    }
    best = "parallel" if length <= chunk_size else "chunked"
    o = dispatch("path_attention", impl, forms, best)(q, k, v, w, beta)
    return o.reshape(batch, length, heads, -1).astype(value.dtype)


@typed
def reflected_keys(
    key: Float[Array, "B S G K"], direction: Float[Array, "B T G K"], beta: Float[Array, "B T G"]
) -> Float[Array, "B S G K"]:
    """Keys as tokens after the last one find them, H_S ⋯ H_{j+1} k_j; the first S − T have met no direction yet.

    A block of up to K tokens is one reflection of rank T, in O(S T K). More are the delta rule without values, from the
    last token to the first, whose state is the product of what is yet to come: O(S K²).

    Raises:
      ValueError: shapes disagree, or T > S.
    """
    batch, length, groups, width = direction.shape
    if not 1 <= length <= key.shape[1]:
        raise ValueError(f"direction has {length} steps and key {key.shape[1]}; reflected_keys takes 1 ≤ T ≤ S.")
    wide = accumulator(key.dtype)
    past, back = key.shape[1] - length, lambda x: jnp.flip(x, axis=1).astype(wide)
    if length <= width:
        own, w, b = (jnp.moveaxis(x.astype(wide), 1, -2) for x in (key[:, past:], direction, beta[..., None]))
        _, _, after, y = _block(own[:, :, None], own, w, b)
        before = jnp.moveaxis(key[:, :past].astype(wide), 1, -2)
        before -= einsum("bgst,bgtk->bgsk", einsum("bgsk,bgtk->bgst", before, y), w)
        return jnp.moveaxis(jnp.concatenate([before, after], axis=-2), -2, 1).astype(key.dtype)
    unit = jnp.broadcast_to(jnp.eye(width, dtype=wide), (batch, groups, width, width))
    older = key[:, past:-1].astype(wide)
    read = jnp.concatenate([jnp.zeros_like(key[:, :1], wide), older], axis=1)
    w = back(direction)
    o, product = delta_rule(back(read), w, jnp.zeros_like(w), back(beta), scale=1.0, initial_state=unit)
    before = einsum("bgkv,bsgk->bsgv", product, key[:, :past].astype(wide))
    after = jnp.flip(o, axis=1)[:, 1:]
    return jnp.concatenate([before, after, key[:, -1:].astype(wide)], axis=1).astype(key.dtype)
