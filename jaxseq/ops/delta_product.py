"""Several corrections a token."""

from typing import Any

import jax.numpy as jnp

from ..shapes import Array, Float, Int, typed
from .delta_rule import delta_rule


@typed
def delta_product(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T n Hk K"],
    value: Float[Array, "B T n H V"],
    beta: Float[Array, "B T n H"],
    log_decay: Float[Array, "B T H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`delta_rule` with n keys and values a token, one after the other (DeltaProduct, arXiv 2502.10297, section 3).

        S_t0 = exp(g_t) S_{t-1}        S_ti = S_t,i-1 + β_ti k_ti (v_ti − S_t,i-1ᵀ k_ti)ᵀ, i = 1 … n
        o_t = scale · S_tnᵀ q_t

    It is the delta rule on a sequence n times as long, which decays before the first correction of a token and is
    read after the last one. Errors are those of `delta_rule`.
    """
    batch, length, n = key.shape[:3]
    options: dict[str, Any] = dict(scale=scale, initial_state=initial_state, chunk_size=chunk_size, impl=impl)
    if n == 1:
        one = (x[:, :, 0] for x in (key, value, beta))
        return delta_rule(query, *one, log_decay, segment_ids=segment_ids, **options)
    long = lambda x: x.reshape(batch, length * n, *x.shape[3:])
    at = lambda i, x: long(jnp.zeros((batch, length, n, *x.shape[2:]), x.dtype).at[:, :, i].set(x))
    ids = None if segment_ids is None else jnp.repeat(segment_ids, n, axis=1)
    decay = None if log_decay is None else at(0, log_decay)
    o, S = delta_rule(at(n - 1, query), long(key), long(value), long(beta), decay, segment_ids=ids, **options)
    return o[:, n - 1 :: n], S
