"""Convolutions over time, one filter a channel: short ones by shifts, long ones by the fast Fourier transform."""

from functools import partial

import jax.numpy as jnp
from scipy.fft import next_fast_len

from ..segments import segment_counts
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from ..sharded import devices, halo, on_last, over_channels


@typed
def short_convolution(
    x: Float[Array, "B T D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, "D"] | None = None,
    *,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Causal depthwise convolution over a window of W tokens; the last row of `weight` meets the current token.

        y_t = Σ_w weight_w ⊙ x_{t-(W-1-w)} + bias

    `initial_state` holds the W−1 inputs before the call, oldest first, zeros when None; the final state holds the
    last W−1 of the current segment. No tap reaches across a change of `segment_ids`.

    Raises:
      ValueError: shapes disagree, or T = 0.
    """
    (batch, length, width), window = x.shape, weight.shape[0]
    if length == 0 or window == 0:
        raise ValueError(f"x has shape {x.shape} and weight {weight.shape}; short_convolution takes T ≥ 1 and W ≥ 1.")
    state = zeros_from(x, (batch, window - 1, width), x.dtype, plus=initial_state)
    shifted, final = taps(x, state, segment_ids)
    weight = weight.astype(accumulator(x.dtype, weight.dtype))
    y = sum(weight[w][None, None] * tap.astype(weight.dtype) for w, tap in enumerate(shifted))
    y = y if bias is None else y + bias.astype(weight.dtype)[None, None]
    return y.astype(x.dtype), final


def taps(x, before, segment_ids=None) -> tuple[list, Array]:
    """W arrays: x `B T …` delayed by W−1, …, 0 steps; and the state after them.

    `before` holds the W−1 tokens before the call, oldest first. A tap beyond a restart, of x or of the state, is zero.
    """
    (batch, length), reach = x.shape[:2], before.shape[1]
    inputs = jnp.concatenate([halo(x, before), x], axis=1)
    if segment_ids is None:
        return [inputs[:, w : w + length] for w in range(reach + 1)], on_last(inputs[:, length:])
    counts = segment_counts(segment_ids)
    first = jnp.zeros((batch, reach), counts.dtype)  # the state belongs to the first segment
    segments = jnp.concatenate([halo(counts, first), counts], axis=1)
    segments = segments.reshape(*segments.shape, *(1,) * (x.ndim - 2))
    within = lambda w, size, own: jnp.where(segments[:, w : w + size] == own, inputs[:, w : w + size], 0)
    shifted = [within(w, length, segments[:, reach:]) for w in range(reach + 1)]
    return shifted, on_last(within(length, reach, segments[:, -1:]))


@typed
def long_convolution(
    x: Float[Array, "B T D"], kernel: Float[Array, "L D"] | Float[Array, "B L D"], *, causal: bool = True
) -> Float[Array, "B T D"]:
    """Depthwise convolution with a kernel as long as the sequence, in O(T log T), at least in float32.

        causal: y_t = Σ_{s≤t} kernel_{t-s} ⊙ x_s        otherwise circular: y_t = Σ_s kernel_{(t-s) mod T} ⊙ x_s

    A kernel with a batch axis is one per sequence. In the causal form entries from lag T on reach nothing. Where time
    is split over devices the kernel is given whole, and for the transform each device takes all times of some channels.

    Raises:
      ValueError: shapes disagree, a circular kernel's length is not T, or the devices do not divide the channels.
    """
    length = x.shape[1] * devices()
    if not causal and kernel.shape[-2] != length:
        raise ValueError(f"kernel has length {kernel.shape[-2]}; a circular convolution takes x's, {length}.")
    return over_channels(partial(fourier_convolution, causal=causal), x, kernel)


def fourier_convolution(x, kernel, *, causal: bool = True, later=None):
    """`long_convolution` of sequences that are whole.

    With `later`, as long as a causal kernel, Σ_{s>t} later_{s-t-1} ⊙ x_s is added in the same transforms.
    """
    length = x.shape[1]
    dtype = accumulator(x.dtype)
    kernel = kernel[..., :length, :].astype(dtype)
    size = next_fast_len(length + kernel.shape[-2] - 1, real=True) if causal else length
    if later is not None:  # lags below zero stand at the end
        later = later[..., : length - 1, :].astype(dtype)
        gap = jnp.zeros((*kernel.shape[:-2], size - length - later.shape[-2], kernel.shape[-1]), dtype)
        kernel = jnp.concatenate([kernel, gap, jnp.flip(later, axis=-2)], axis=-2)
    spectrum = jnp.fft.rfft(kernel, size, axis=-2)
    spectrum = spectrum if kernel.ndim == 3 else spectrum[None]
    y = jnp.fft.irfft(jnp.fft.rfft(x.astype(dtype), size, axis=1) * spectrum, size, axis=1)
    return y[:, :length].astype(x.dtype)
