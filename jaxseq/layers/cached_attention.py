"""The body of attention mixers: projections, rotary positions and a cache, around any rule of who sees whom."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from ..monoid import Affine, affine
from ..segments import segment_counts, segment_starts, tokens_so_far
from ..shapes import Array, Float, Int, accumulator
from ..sharded import across_devices, devices, first_position, on_last
from .mixer import Mixer
from .projection import projection, split_heads
from .rotary import rotary


class AttentionState(NamedTuple):
    key: Float[Array, "B L H K"]  # the last L tokens, newest last
    value: Float[Array, "B L H K"]
    segment: Int[Array, "B L"]  # 0: the segment (with blocks: the block) in progress; below: an earlier one, or nothing
    position: Int[Array, ""]  # tokens seen so far
    filled: Int[Array, "B"] | None = None  # with blocks: tokens in the block in progress
    log_decay: Float[Array, "B L H"] | None = None  # with forget gates: theirs


def query_key_value(mixer: Mixer, x: Array, position: Array | int, kv_heads: int) -> tuple[Array, Array, Array]:
    """q `B T H K`, k and v `B T G K` of tokens from this position on: projected, q and k turned."""
    length, width = x.shape[1], mixer.d_model // mixer.num_heads
    project = lambda name, heads: split_heads(projection(heads * width, name, mixer)(x), width)
    q, k, v = project("q_proj", mixer.num_heads), project("k_proj", kv_heads), project("v_proj", kv_heads)
    if mixer.rotary_base is not None:
        positions = first_position(length) + position + jnp.arange(length, dtype=jnp.int32)
        q, k = (rotary(a, positions, mixer.rotary_base) for a in (q, k))
    return q, k, v


def cached_attention(
    mixer: Mixer,
    x: Array,
    state: AttentionState | None,
    counts: Array | None,
    kv_heads: int,
    attend: Callable,
    log_decay: Array | None = None,
    kept: Callable = lambda key: key,
) -> tuple[Array, AttentionState | None]:
    """y = W_o attend(q, k, v): a mixer's body, with the keys and values of its cache in front of those of x.

    `attend(q "B T H K", k "B L+T G K", v "B L+T G K", **packed) -> o "B T H K"`, where `packed` holds `segment_ids` and
    `key_segment_ids`, or nothing where all is one segment. `counts` number the segments from the one in progress at
    the start of the call, None where it goes on. `log_decay` `B T H`, of tokens of x, is cached as they are and handed
    to `attend`. `kept` maps the keys `B L+T G K` to what is cached of them. `mixer` has the fields of `Attention`.
    Without a state there is no cache, before or after.
    """
    batch, length, d_model = x.shape
    q, k, v = query_key_value(mixer, x, 0 if state is None else state.position, kv_heads)
    out = lambda o: projection(d_model, "out_proj", mixer)(o.reshape(batch, length, -1))
    if state is None:
        packed = {} if counts is None else dict(segment_ids=counts, key_segment_ids=counts)
        return out(attend(q, k, v, **packed)), None
    cached = state.key.shape[1]
    after = lambda kept, a: jnp.concatenate([kept.astype(a.dtype), a], axis=1)
    k, v = after(state.key, k), after(state.value, v)
    own = jnp.zeros((batch, length), jnp.int32) if counts is None else counts
    segments = after(state.segment, own)
    packed = dict(segment_ids=own, key_segment_ids=segments) if cached or counts is not None else {}
    if log_decay is not None:
        packed["log_decay"] = log_decay = after(state.log_decay, log_decay)
    y = out(attend(q, k, v, **packed))
    last = lambda a, like: on_last(a[:, a.shape[1] - cached :].astype(like.dtype))
    return y, AttentionState(
        last(kept(k) if cached else k, state.key),
        last(v, state.value),
        last(segments - segments[:, -1:], segments),
        state.position + length * devices(),
        log_decay=None if log_decay is None else last(log_decay, state.log_decay),
    )


def empty_cache(
    mixer: Mixer, batch_size: int, spans: list[int | None], kv_heads: int, dtype, fading: bool = False
) -> AttentionState:
    """The state at the start: a cache of the shortest of these spans, with log decays where keys are `fading`.

    Raises:
      ValueError: none of them is known, or one is negative.
    """
    known, kind = [span for span in spans if span is not None], type(mixer).__name__
    if not known:
        raise ValueError(f"max_length=None; {kind} without a window takes the number of tokens its cache holds.")
    if min(known) < 0:
        raise ValueError(f"max_length={spans[0]}; {kind} takes 0 or more.")
    shape = (batch_size, min(known), kv_heads, mixer.d_model // mixer.num_heads)
    segment = jnp.full(shape[:2], -1, jnp.int32)
    gates = jnp.zeros((*shape[:2], mixer.num_heads), accumulator(dtype)) if fading else None
    zeros = lambda: jnp.zeros(shape, dtype)
    return AttentionState(zeros(), zeros(), segment, jnp.zeros((), jnp.int32), log_decay=gates)


def counted(segment_ids: Array | None) -> Array | None:
    """Segments numbered from the one in progress; None where there is but that one."""
    return None if segment_ids is None else segment_counts(segment_ids)


def block_counts(
    starts: Array, filled: Int[Array, "B"], block_size: int, gap: int
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Numbers of the blocks of `block_size` tokens that begin with every segment, and how much of the last is filled.

    The block in progress has number 0 (where it is full, the next one is 1), the last of a segment and the first of the
    next are `gap` numbers further apart. `starts` are those of segments; `filled` is the state before the call.
    """
    reached, final = tokens_so_far(starts, filled)
    jumps = ((reached - 1) % block_size == 0).astype(jnp.int32) + gap * starts.astype(jnp.int32)
    jumps = jnp.cumsum(jumps, axis=1, dtype=jnp.int32)
    total = lambda: Affine(jnp.ones_like(final), jumps[:, -1])
    add = lambda earlier: (earlier[:, None] + jumps, earlier + jumps[:, -1])
    return across_devices(affine, total, add, jnp.zeros_like(final))[0], final % block_size


def starts_of(segment_ids: Array | None, shape: tuple[int, ...]) -> Array:
    """Where segments start; nowhere in the call where there is but one."""
    return jnp.zeros(shape, bool) if segment_ids is None else segment_starts(segment_ids)
