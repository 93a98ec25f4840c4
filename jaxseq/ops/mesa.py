"""Least squares over the past, solved anew at every token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from .gated_linear_attention import gated_linear_attention


class MesaState(NamedTuple):
    keys: Float[Array, "B H K K"]  # Σ β k kᵀ, decayed
    values: Float[Array, "B H K V"]  # Σ β k vᵀ, decayed


@typed
def mesa(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"],
    ridge: Float[Array, "H K"],
    *,
    steps: int = 30,
    initial_state: MesaState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], MesaState]:
    """What the linear map that fits all values so far best, in decayed least squares, makes of the query.

        H_t = exp(g_t) H_{t-1} + β_t k_t k_tᵀ        G_t = exp(g_t) G_{t-1} + β_t k_t v_tᵀ
        o_t = G_tᵀ (H_t + diag λ)⁻¹ q_t        (MesaNet, arXiv 2506.05233)

    λ, `ridge`, is above 0. The system is solved by `steps` conjugate gradients, for all tokens at once: H_t p_t is
    `gated_linear_attention` with p as the query, whose errors it raises. The gradient is that of the exact solution,
    by one more solve.
    """
    wide = accumulator(query.dtype)
    written = beta[..., None].astype(wide) * key.astype(wide)
    keys, values = (None, None) if initial_state is None else initial_state
    # The solve wants all that it closes over to vary over the same axes of a mesh.
    batch, _, heads, K = key.shape
    keys = zeros_from(query, (batch, heads, K, K), wide, plus=keys)
    ridge = zeros_from(query, (heads, K), wide, plus=ridge)
    options = dict(segment_ids=segment_ids, chunk_size=chunk_size, impl=impl)
    attend = partial(gated_linear_attention, key=written, log_decay=log_decay, scale=1.0, **options)
    over_keys = partial(attend, value=key.astype(wide), initial_state=keys)
    system = lambda p: over_keys(p)[0] + ridge[None, None] * p
    solve = partial(conjugate_gradients, steps=steps)
    x = lax.custom_linear_solve(system, query.astype(wide), solve, symmetric=True)
    o, values = attend(x, value=value.astype(wide), initial_state=values)
    return o.astype(value.dtype), MesaState(over_keys(x)[1], values)


def conjugate_gradients(system, b: jax.Array, *, steps: int) -> jax.Array:
    """x with system(x) = b, of many symmetric and positive systems, one for each last axis."""
    dot = lambda x, y: jnp.sum(x * y, axis=-1, keepdims=True)
    enough = jnp.finfo(b.dtype).eps ** 2 * dot(b, b)

    def step(_, carry):
        x, residual, direction, square = carry
        image = system(direction)
        going = square > enough
        length = jnp.where(going, square / jnp.where(going, dot(direction, image), 1), 0)
        residual -= length * image
        left = dot(residual, residual)
        turned = residual + jnp.where(going, left / jnp.where(going, square, 1), 0) * direction
        return x + length * direction, residual, turned, jnp.where(going, left, square)

    x, *_ = lax.fori_loop(0, steps, step, (jnp.zeros_like(b), b, b, dot(b, b)))
    return x
