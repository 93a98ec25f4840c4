"""Convolution with a kernel of lags that the sequence writes as it goes: the causal form of Orchid's correlation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import Affine, affine
from ..segments import segment_counts, segment_starts
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from ..sharded import across_devices, halo, own
from .convolution import taps
from .dispatch import dispatch
from .linear_recurrence import recurrence


class LagState(NamedTuple):
    """What has been correlated at each lag, and the W−1 tokens before, oldest first."""

    correlation: Float[Array, "B W D"]
    key: Float[Array, "B W-1 D"]
    value: Float[Array, "B W-1 D"]


class _Tokens(NamedTuple):
    """Key and value with the W−1 tokens before the call, and the segment of each, whose numbers rise."""

    query: Array  # B T D
    key: Array  # B T+W-1 D
    value: Array  # B T+W-1 D
    segment: Array  # B T+W-1

    def windows(self, window: int) -> tuple[Array, Array]:
        """Key and value at each lag: `B T W D`, zero where another segment is reached."""
        length = self.query.shape[1]
        lags = [slice(window - 1 - lag, window - 1 - lag + length) for lag in range(window)]
        same = jnp.stack([self.segment[:, lag] == self.segment[:, window - 1 :] for lag in lags], axis=2)[..., None]
        at_lags = lambda x: jnp.where(same, jnp.stack([x[:, lag] for lag in lags], axis=2), 0)
        return at_lags(self.key), at_lags(self.value)


def by_token(form: str, tokens: _Tokens, log_decay, kernel, before, correlation):
    """The definition: the correlation after each token, `B T W D`, read at once."""
    window = kernel.shape[0]
    key, value = tokens.windows(window)
    segment = tokens.segment[:, window - 1 :]
    starts = segment != jnp.concatenate([before[:, None], segment[:, :-1]], axis=1)
    inputs = tokens.query[:, :, None] * key
    decay = jnp.where(starts[..., None, None], 0, jnp.exp(log_decay)[None, None, None])
    states, final = recurrence(form)(jnp.broadcast_to(decay, inputs.shape), inputs, correlation)
    return jnp.sum((kernel[None, None] + states) * value, axis=2), final


def by_chunk(size: int, tokens: _Tokens, log_decay, kernel, before, correlation):
    """The correlation before each chunk, and inside it products of all pairs of tokens:

        y_i = Σ_τ (h_τ + λ^i c_τ) v_{i-τ} + Σ_{j≤i} λ^{i-j} q_j Σ_τ k_{j-τ} v_{i-τ}

    The backward pass keeps one correlation a chunk and computes the rest again.
    """
    window, length = kernel.shape[0], tokens.query.shape[1]
    chunks, reach = -(-length // size), window - 1
    # Tokens after the last one add nothing, and time stands still for them: nothing decays.
    after = [(0, 0), (0, chunks * size - length)]
    query, key, value = (jnp.pad(x, [*after, (0, 0)]) for x in tokens[:3])
    padded = _Tokens(query, key, value, jnp.pad(tokens.segment, after, mode="edge"))

    @jax.checkpoint
    def step(carry, start):
        c, last = carry
        here = _Tokens(
            lax.dynamic_slice_in_dim(padded.query, start, size, 1),
            *(lax.dynamic_slice_in_dim(x, start, size + reach, 1) for x in padded[1:]),
        )
        key, value = here.windows(window)
        segment = here.segment[:, reach:]
        time = jnp.minimum(start + 1 + jnp.arange(size, dtype=jnp.int32), length) - jnp.minimum(start, length)
        since = jnp.where((segment == last[:, None])[..., None], _power(log_decay, time), 0)  # B C D
        later = jnp.tril(segment[:, :, None] == segment[:, None, :])[..., None]  # B C C 1: what i reads of j
        apart = jnp.where(later, _power(log_decay, jnp.maximum(time[:, None] - time[None], 0)), 0)
        written = apart * here.query[:, None]
        read = kernel[None, None] + since[:, :, None] * c[:, None]
        pairs = jnp.einsum("biwd,bjwd->bijd", value, key)
        y = jnp.einsum("biwd,biwd->bid", read, value) + jnp.einsum("bijd,bijd->bid", written, pairs)
        c = since[:, -1, None] * c + jnp.einsum("bjd,bjwd->bwd", written[:, -1], key)
        return (c, segment[:, -1]), y

    starts = jnp.arange(chunks, dtype=jnp.int32) * size
    (final, _), y = lax.scan(step, (correlation, before), starts)
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[-1])[:, :length], final


def _power(log_decay, count):
    """λ^count, with the channels last; λ⁰ is 1, also of λ = 0."""
    count = count[None, ..., None].astype(log_decay.dtype)
    return jnp.exp(jnp.where(count == 0, 0, count * lax.expand_dims(log_decay, range(count.ndim - 1))))


@typed
def lag_correlation(
    query: Float[Array, "B T D"],
    key: Float[Array, "B T D"],
    value: Float[Array, "B T D"],
    log_decay: Float[Array, "D"],
    kernel: Float[Array, "W D"],
    *,
    initial_state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T D"], LagState]:
    """Values convolved with a kernel, and with the decayed correlation of queries with earlier keys, lag by lag.

        c_t[τ] = λ c_{t-1}[τ] + q_t k_{t-τ}        y_t = Σ_τ (h[τ] + c_t[τ]) v_{t-τ}        τ = 0 … W−1, λ = exp g

    Where a pattern comes again after τ tokens, c finds τ, and y the value so many tokens ago. `log_decay` g is a
    natural log, ≤ 0. `initial_state` is a `LagState`, zeros when None; the final one is at least float32. The forms
    `sequential` and `parallel` keep T W D numbers; `chunked` keeps W D a chunk, of `chunk_size` tokens.

    Raises:
      ValueError: shapes disagree, T = 0, W = 0 or chunk_size < 1.
      NotImplementedError: `impl` is none of the forms.
    """
    (batch, length, width), window = query.shape, kernel.shape[0]
    if length == 0 or window == 0:
        raise ValueError(
            f"query has shape {query.shape}, kernel {kernel.shape}; lag_correlation takes T ≥ 1 and W ≥ 1."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; lag_correlation takes 1 or more.")
    dtype = accumulator(query.dtype, key.dtype, value.dtype)
    q, k, v, log_decay, kernel = (x.astype(dtype) for x in (query, key, value, log_decay, kernel))
    shapes = ((batch, window, width), *((batch, window - 1, width),) * 2)
    given = (None,) * 3 if initial_state is None else initial_state
    for name, array, shape in zip(LagState._fields, given, shapes, strict=True):
        if array is not None and array.shape != shape:
            raise ValueError(f"initial_state.{name} has shape {array.shape}; query {query.shape} takes {shape}.")
    c, k_before, v_before = (zeros_from(q, shape, dtype, plus=x) for shape, x in zip(shapes, given, strict=True))
    ids = zeros_from(q, (batch, length), jnp.int32, plus=segment_ids)
    counts = segment_counts(ids)
    extended = lambda x, before: jnp.concatenate([halo(x, before), x], axis=1)
    tokens = _Tokens(
        q,
        extended(k, k_before),
        extended(v, v_before),
        extended(counts, jnp.zeros_like(counts, shape=(batch, window - 1))),
    )
    before = counts[:, 0] - segment_starts(ids)[:, 0].astype(counts.dtype)
    tokens, log_decay, kernel, before, c = own((tokens, log_decay, kernel, before, c))
    forms = {
        "sequential": partial(by_token, "sequential"),
        "parallel": partial(by_token, "parallel"),
        "chunked": partial(by_chunk, min(length, chunk_size or 16)),
    }
    form = dispatch("lag_correlation", impl, forms, "chunked")
    run = partial(form, tokens, log_decay, kernel, before)

    def total():
        kept = jnp.where((counts[:, -1] == before)[:, None, None], jnp.exp(length * log_decay)[None, None], 0)
        return Affine(jnp.broadcast_to(kept, c.shape), run(jnp.zeros_like(c))[1])

    y, final = across_devices(affine, total, run, c)
    _, k_after = taps(k, k_before, segment_ids)
    _, v_after = taps(v, v_before, segment_ids)
    return y.astype(query.dtype), LagState(final, k_after, v_after)
