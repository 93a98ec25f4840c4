"""Softmax attention over slots that gather keys and values."""

from functools import partial
from typing import NamedTuple

import jax

from ..shapes import Array, Float, Int, accumulator, typed
from .gated_linear_attention import gated_linear_attention


class SlotState(NamedTuple):
    keys: Float[Array, "B H K M"]
    values: Float[Array, "B H M V"]


@typed
def slot_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    write: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    scale: float | None = None,
    initial_state: SlotState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], SlotState]:
    """Attention to M slots, each of which keeps a decayed sum of keys and of values.

        K_t = K_{t-1} diag(exp g_t) + k_t s_tᵀ        V_t = diag(exp g_t) V_{t-1} + s_t v_tᵀ
        o_t = V_tᵀ softmax(scale · K_tᵀ q_t)        (GSA, arXiv 2409.07146, section 3)

    Two passes of `gated_linear_attention`, whose errors it raises: which slots a query finds, and what is in them. s is
    `write`; `scale` is K^-½ when None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (None, None) if initial_state is None else initial_state
    options = dict(log_decay=log_decay, segment_ids=segment_ids, chunk_size=chunk_size, impl=impl)
    read = partial(gated_linear_attention, **options)
    found, keys = read(query, key, write, scale=scale, initial_state=keys, decay_axis="value")
    shares = jax.nn.softmax(found.astype(accumulator(found.dtype))).astype(value.dtype)
    o, values = read(shares, write, value, scale=1.0, initial_state=values)
    return o, SlotState(keys, values)
