"""Softmax attention over slots that gather keys and values."""

from functools import partial

import jax

from ..shapes import Array, Float, typed
from .gated_linear_attention import gated_linear_attention


@typed
def slot_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    write: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    keys: Float[Array, "B H K M"] | None,
    values: Float[Array, "B H M V"] | None,
    *,
    scale: float,
    **options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K M"], Float[Array, "B H M V"]]:
    """Outputs, and the keys and values of the M slots.

        K_t = K_{t-1} diag(exp g_t) + k_t s_tᵀ        V_t = diag(exp g_t) V_{t-1} + s_t v_tᵀ
        o_t = V_tᵀ softmax(scale · K_tᵀ q_t)        (GSA, arXiv 2409.07146, section 3)

    Two passes of `gated_linear_attention`, which takes the `options`: which slots a query finds, and what is in
    them.
    """
    read = partial(gated_linear_attention, log_decay=log_decay, **options)
    found, keys = read(query, key, write, scale=scale, initial_state=keys, decay_axis="value")
    o, values = read(jax.nn.softmax(found), write, value, scale=1.0, initial_state=values)
    return o, keys, values
