"""Exponential weights kept beside a running scale, so that none overflows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int, typed
from .convolution import taps
from .log_matmul import Semiring
from .log_recurrence import log_recurrence


class Rescaled(NamedTuple):
    weight: Float[Array, "B T *D"]  # exp(w_t − m_t)
    log_decay: Float[Array, "B T *D"]  # f_t + m_{t-1} − m_t
    log_scale: Float[Array, "B T *D"]  # m
    last: Float[Array, "B 1 *D"]  # m_T, which is the state


@typed
def rescaled(
    log_decay: Float[Array, "B T *D"] | None,
    log_weight: Float[Array, "B T *D"],
    last: Float[Array, "B 1 *D"],
    segment_ids: Int[Array, "B T"] | None = None,
    semiring: Semiring = "log_sum_exp",
) -> Rescaled:
    """What is decayed by exp f_t and written with weight exp w_t, times exp(−m_t).

        m_t = (f_t + m_{t-1}) ⊕ w_t

    ⊕ is log (exp + exp), and the weights of all times so far sum to one; or max, a mere scale: then what is made of
    the weights must not depend on m, and no gradient goes through it. f is zero when None.
    """
    moving = log_decay, log_weight
    m, final = log_recurrence(
        *(jax.lax.stop_gradient(moving) if semiring == "max_plus" else moving),
        initial_state=last[:, 0],
        segment_ids=segment_ids,
        semiring=semiring,
    )
    (before, _), _ = taps(m, last.astype(m.dtype))
    g = before - m if log_decay is None else log_decay + before - m
    g -= jax.lax.stop_gradient(jnp.maximum(g, 0))  # what rounding left above zero, where m is f + before
    g = jnp.where(jnp.isneginf(before), -jnp.inf, g)
    return Rescaled(jnp.exp(log_weight - m), g, m, final[:, None].astype(last.dtype))
