"""o_i = Σ_j softmax_j(scale · q_i·k_j) v_j: softmax attention over the keys a query may see."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import Softmax, softmax
from ..shapes import Array, Float, Int, accumulator, check_log_decay, typed
from ..sharded import first_position, halo, is_split
from .dispatch import dispatch
from .flash_attention import Sight, flash_attention
from .fused_attention import fused_attention
from .ring_attention import ring_attention
from .visibility import (
    NOWHERE,
    Fading,
    Rules,
    averaged,
    check_heads,
    check_lengths,
    check_segments,
    faded,
    running_sum,
    visible,
)

# The forms take queries `B T G R K` (R query heads share each of G key heads), keys and values `B S G …`, the
# positions of queries `T` and keys `S`, segments `B T`, `B S` or None, and the fading of queries and of keys, or None.


def sequential(q, k, v, positions, segments, fading, rules):
    """A fold of the softmax monoid over the keys, for all queries at once."""
    q, k, v = (x.astype(accumulator(x.dtype)) for x in (q, k, v))

    def step(state, token):
        k, v, position, segment, of_key = token
        logit = rules.capped(jnp.einsum("btgrk,bgk->btgr", q, k))[..., None]
        lag = positions[0][:, None] - position[None, None]
        logit = faded(logit, fading and (fading[0], of_key), lag, rules.ramp)[..., 0]
        mask = rules.visible(positions[0], position[None], segments and (segments[0], segment[:, None]))[
            ..., 0, None, None
        ]
        logit = jnp.where(mask, logit, -jnp.inf)
        value = jnp.broadcast_to(v[:, None, :, None], (*logit.shape, v.shape[-1]))
        return softmax.act(Softmax.from_token(logit, value), state), None

    logits = jnp.zeros_like(q[..., 0])
    start = softmax.identity(Softmax(logits, logits, jnp.broadcast_to(logits[..., None], (*logits.shape, v.shape[-1]))))
    time_first = lambda x: x.swapaxes(0, 1)
    of_keys = fading and jax.tree.map(lambda x: time_first(x)[:, :, None], fading[1])
    tokens = time_first(k), time_first(v), positions[1], segments and time_first(segments[1]), of_keys
    final, _ = lax.scan(step, start, tokens)
    return final.average()


def parallel(q, k, v, positions, segments, fading, rules):
    """All pairs at once: T·S logits a head."""
    logits = rules.capped(jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=accumulator(q.dtype)))
    return averaged(logits, v, positions, segments, fading, rules)


def chunked(q, k, v, positions, segments, fading, rules, chunk_size, reach):
    """A block of queries at a time, recomputed in the backward pass: C·S logits a head, C·(C + reach) in a window."""
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    front = 0 if reach is None else max(0, reach - past)
    end = -length % chunk_size
    pad = lambda x, before, value=0: jnp.pad(
        x, ((0, 0), (before, end)) + ((0, 0),) * (x.ndim - 2), constant_values=value
    )
    pad_positions = lambda x, before: jnp.pad(x, (before, end), constant_values=NOWHERE)
    q, k, v = pad(q, 0), pad(k, front), pad(v, front)
    positions = pad_positions(positions[0], 0), pad_positions(positions[1], front)
    segments = segments and (pad(segments[0], 0), pad(segments[1], front, -1))
    fading = fading and tuple(
        jax.tree.map(partial(pad, before=n), of) for n, of in zip((0, front), fading, strict=True)
    )
    span = k.shape[1] if reach is None else chunk_size + reach

    @jax.checkpoint
    def block(start):
        first_key = 0 if reach is None else start + past + front - reach
        queries = lambda x, axis=1: lax.dynamic_slice_in_dim(x, start, chunk_size, axis)
        keys = lambda x, axis=1: lax.dynamic_slice_in_dim(x, first_key, span, axis)
        at = queries(positions[0], 0), keys(positions[1], 0)
        ids = segments and (queries(segments[0]), keys(segments[1]))
        both = fading and (jax.tree.map(queries, fading[0]), jax.tree.map(keys, fading[1]))
        return parallel(queries(q), keys(k), keys(v), at, ids, both, rules)

    o = lax.map(block, jnp.arange(0, length + end, chunk_size))
    return o.swapaxes(0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :length]


def in_kernel(sight: Sight, q, k, v, positions, segments, fading):
    o = flash_attention(sight, q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, segments)
    return o.reshape(*q.shape[:-1], v.shape[-1])


def fused(q, k, v, positions, segments, fading, causal, window, beyond):
    return fused_attention(q.reshape(*q.shape[:2], -1, q.shape[-1]), k, v, causal, window, beyond).reshape(q.shape)


@typed
def softmax_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    look_back: int = 0,
    log_decay: Float[Array, "B S H"] | None = None,
    span: Float[Array, "H"] | Float[Array, "B T H"] | None = None,
    ramp: float = 32.0,
    scale: float | None = None,
    logit_softcap: float | None = None,
    chunk_size: int = 256,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention, each query over the keys it may see.

        o_i = Σ_j a_ij v_j        a_ij = softmax_j(cap(scale · q_i·k_j) + Σ_{j<u≤i} g_u + log m_i(i − j))
        cap(x) = c tanh(x / c)        m_i(x) = clip(1 + (z_i − x) / R, 0, 1)

    Each of G key heads serves a run of H/G consecutive query heads. With more keys than queries, the queries stand
    at the last T positions. `window` w sees the last w positions, itself included (both sides when not causal).
    A query sees keys of its own segment only, and of those whose numbers are up to `look_back` lower;
    `key_segment_ids` are the queries' when None. `log_decay` g, natural logs ≤ 0 of the tokens of the keys and for
    every query head, is zero when None (Forgetting Transformer, arXiv 2503.02130). `span` z ≥ 0, of a head or of each
    query, is how far it sees, in tokens; beyond it weights fall to zero over a `ramp` of R tokens (adaptive span, arXiv
    1905.07799). Causal attention alone has these two.
    `scale` is K^-½ when None, `logit_softcap` c is off when None. A query that may see no key returns zero. With time
    split over devices, keys of a causal window come from the device before, others go round a ring, in blocks of
    `chunk_size` queries.
    `fused` is the platform's own attention, cuDNN's on an NVIDIA GPU: of one segment in bfloat16 or float16, with as
    many keys as queries where it is causal, and nothing that fades or is capped. Its gradient has no second one, and
    differs from run to run by rounding unless XLA is told otherwise: None does not pick it.

    Raises:
      ValueError: shapes disagree, G does not divide H, T > S, window < 1, look_back < 0, ramp ≤ 0, segments of queries
        alone, decays or spans where it is not causal, or a log decay known to be above 0.
      NotImplementedError: `impl` is none of the forms, "fused" is not for this call or not there, or S > T with time
        split over devices.
    """
    (batch, length, heads, width), (_, size, groups, _) = query.shape, key.shape
    check_heads(key, heads)
    check_lengths("softmax_attention", length, size)
    if window is not None and window < 1:
        raise ValueError(f"window={window}; softmax_attention takes 1 or more, or None.")
    if look_back < 0:
        raise ValueError(f"look_back={look_back}; softmax_attention takes 0 or more.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; softmax_attention takes 1 or more.")
    check_segments(segment_ids, key_segment_ids, length, size)
    check_log_decay(log_decay, "softmax_attention")
    for name, given in (("log_decay", log_decay), ("span", span)):
        if given is not None and not causal:
            raise ValueError(f"{name} is between a key and a later query; softmax_attention takes it with causal=True.")
    if not ramp > 0:
        raise ValueError(f"ramp={ramp}; softmax_attention takes a number of tokens above 0.")
    key_segments = segment_ids if key_segment_ids is None else key_segment_ids
    q = query * jnp.asarray(width**-0.5 if scale is None else scale, query.dtype)
    q = q.reshape(batch, length, groups, heads // groups, width)
    capped = (lambda x: x) if logit_softcap is None else (lambda x: logit_softcap * jnp.tanh(x / logit_softcap))
    rules = Rules(partial(visible, causal, window, look_back), capped, ramp)
    finish = lambda o: o.reshape(batch, length, heads, -1).astype(value.dtype)
    positions = jnp.arange(size - length, size, dtype=jnp.int32), jnp.arange(size, dtype=jnp.int32)
    # What a window reaches back, where the device before has it all.
    behind = window - 1 if causal and window is not None and window <= length + 1 else None
    if is_split() and behind is not None:
        past, keys = size - length, jnp.arange(-behind, length, dtype=jnp.int32)
        key, value, key_segments, log_decay = (
            _with_halo(x, past, behind) for x in (key, value, key_segments, log_decay)
        )
        positions = keys[behind:], jnp.where(first_position(length) + keys < -past, NOWHERE, keys)
        size = key.shape[1]
    segments = None if segment_ids is None else (segment_ids, key_segments)
    per_head = lambda x: x.reshape(batch, -1, groups, heads // groups).astype(accumulator(x.dtype))
    total = None if log_decay is None else running_sum(per_head(log_decay), across=behind is None)
    ends = None if span is None else per_head(jnp.broadcast_to(span, (batch, length, heads)))
    fading = None
    if not (total is None and ends is None):
        fading = Fading(jax.tree.map(lambda x: x[:, size - length :], total), ends), Fading(total, None)
    if is_split() and behind is None:
        if length != size:
            raise NotImplementedError(
                f"query has {length} positions, key {size}; with time split over devices they are the same, but for a "
                "causal window that fits on a device."
            )
        sizes = {"parallel": length, "chunked": min(chunk_size, length)}
        rings = {name: partial(ring_attention, rules=rules, causal=causal, chunk_size=n) for name, n in sizes.items()}
        return finish(
            dispatch("softmax_attention over devices", impl, rings, "chunked")(q, key, value, segments, fading)
        )
    reach = window - 1 if causal and window is not None and window - 1 + chunk_size < size else None
    forms = {
        "sequential": partial(sequential, rules=rules),
        "parallel": partial(parallel, rules=rules),
        "chunked": partial(chunked, rules=rules, chunk_size=min(chunk_size, length), reach=reach),
    }
    if not is_split():
        further = {"segment_ids": segments, "log_decay": log_decay, "span": span, "logit_softcap": logit_softcap}
        beyond = [name for name, argument in further.items() if argument is not None]
        forms["fused"] = partial(fused, causal=causal, window=window, beyond=beyond)
        if look_back == 0 and fading is None:  # the kernel compares segments for equality
            behind = None if window is None or window >= size else window - 1
            sight = Sight(size - length, size, behind, 0 if causal else behind, logit_softcap, segments is not None)
            forms["pallas"] = partial(in_kernel, sight)
    best = "parallel" if length * size <= chunk_size * 4 * chunk_size and reach is None else "chunked"
    return finish(dispatch("softmax_attention", impl, forms, best)(q, key, value, positions, segments, fading))


def _with_halo(x, past, reach):
    """Of `past` keys before the sequence and a device's own ones: the `reach` keys before its own, and its own."""
    if x is None:
        return None
    before = jnp.pad(x[:, :past], ((0, 0), (reach, 0)) + ((0, 0),) * (x.ndim - 2))[:, past:]
    return jnp.concatenate([halo(x[:, past:], before), x[:, past:]], axis=1)
