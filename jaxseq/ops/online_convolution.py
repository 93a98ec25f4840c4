"""Long causal convolutions that decode: T tokens one by one in O(T log² T), where a window each is O(T²).

What a token gives to later outputs is given in tiles (Flash Inference, arXiv 2410.12982; relaxed multiplication, van
der Hoeven 1997). After token t of a period of P, with U the largest power of two that divides t, the last U inputs give
to the next U outputs, through taps 1 … 2U − 1, by one transform of size 2U. Every pair of an input and a later output
falls into one tile, so that an output is complete when its turn comes. The same tiles keep packed sequences apart.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..segments import segment_counts
from ..shapes import Array, Float, Int, accumulator, typed
from ..sharded import AXIS, is_split, over_channels
from .convolution import fourier_convolution

#: `count -> count D`: the taps of the first so many lags, zeros beyond the last.
Taps = Callable[[int], Array]
#: Tiles up to this size are products with a Toeplitz matrix.
DIRECT = 8
#: A call of T ≤ P / 32 tokens, and at most so many, is steps: transforms of P + T take up to 100 times as long.
STEPS = 64


class ConvolutionState(NamedTuple):
    """The last P inputs, and what they give to outputs to come: 2 P D + D numbers and a position."""

    inputs: Float[Array, "B P D"]  # a ring: those of this period up to the position, those of the last one from it on
    sums: Float[Array, "B P D"]  # of this period, in at least float32; complete at the position
    ready: Float[Array, "B D"]  # the sum at the position
    position: Int[Array, ""]


def cut(taps: Callable[[int], Array], length: int) -> Taps:
    """Zeros from lag `length` on."""

    def padded(count: int):
        return jnp.pad(taps(min(count, length)), ((0, max(0, count - length)), (0, 0)))

    return padded


def empty_convolution(batch_size: int, lags: int, width: int, dtype) -> ConvolutionState:
    """The state before the first token: for `lags` taps, P the next power of two; none at all where they are 0.

    Where it has room for fewer lags than the filter has taps, what lies further back is not seen, in calls of more
    tokens neither: a window of P. Without room a call sees all of its own.
    """
    size = 1 << (lags - 1).bit_length() if lags else 0
    wide = accumulator(dtype)
    inputs, sums = (jnp.zeros((batch_size, size, width), kind) for kind in (dtype, wide))
    return ConvolutionState(inputs, sums, jnp.zeros((batch_size, width), wide), jnp.zeros((), jnp.int32))


@typed
def online_convolution(
    x: Float[Array, "B T D"],
    taps: Taps,
    state: ConvolutionState,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], ConvolutionState]:
    """y_t = Σ_j taps_j ⊙ x_{t-j} from a state, in at least float32; no tap reaches across a change of `segment_ids`.

    `taps` is asked for as many lags as are needed: those of a long filter are not computed anew for every token. One
    token takes a step of the tiling, and so does each of a few; many take one transform of P + T tokens (O(T log² T)
    where they are packed), which leaves the state at the start of a period.

    Raises:
      ValueError: T = 0, or shapes disagree.
    """
    batch, size, width = state.inputs.shape
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}; online_convolution takes at least one step of time.")
    if (batch, width) != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"state.inputs has shape {state.inputs.shape}; x has {x.shape}: batch and channels are theirs."
        )
    if size:
        taps = cut(taps, size)
    if (columns := jax.eval_shape(lambda: taps(1)).shape[1]) != width:
        raise ValueError(f"taps have {columns} channels; x has {width}.")
    if x.shape[1] == 1 and not is_split():
        segment_ids = None  # the state continues the segment of the first token
    if size and segment_ids is None and not is_split():
        wide = x.astype(state.sums.dtype)
        if x.shape[1] == 1:
            y, state = _step(wide[:, 0], taps, state)
            return y[:, None].astype(x.dtype), state
        if x.shape[1] <= min(STEPS, size // 32):
            state, y = lax.scan(lambda state, x: _step(x, taps, state)[::-1], state, wide.swapaxes(0, 1))
            return y.swapaxes(0, 1).astype(x.dtype), state
    counts = None if segment_ids is None else segment_counts(segment_ids)
    if counts is not None and is_split():
        counts = lax.all_gather(counts, AXIS, axis=1, tiled=True)
    # The ring from the oldest input on.
    past = jnp.roll(state.inputs, -state.position, axis=1)
    kernel = taps(size + x.shape[1] * (lax.axis_size(AXIS) if is_split() else 1))
    convolve = partial(_convolve, counts=counts)
    y, inputs, sums = over_channels(convolve, x, kernel, past)
    sums = sums.astype(state.sums.dtype)
    ready = sums[:, 0] if size else state.ready
    return y, ConvolutionState(inputs.astype(state.inputs.dtype), sums, ready, jnp.zeros_like(state.position))


def _convolve(x, kernel, past, *, counts):
    """Outputs, the last P inputs, and what they give to the next P outputs."""
    size, length, dtype = past.shape[1], x.shape[1], accumulator(x.dtype, past.dtype)
    known = jnp.concatenate([past.astype(dtype), x.astype(dtype)], axis=1)
    kernel = kernel.astype(dtype)
    if counts is None:
        y = fourier_convolution(known, kernel, causal=True)[:, size:]
        last = known[:, length:]
    else:
        counts = jnp.pad(counts, ((0, 0), (size, 0)))  # the state belongs to the first segment
        y = _packed(known, kernel, counts)[:, size:]
        last = jnp.where((counts == counts[:, -1:])[:, length:, None], known[:, length:], 0)
    to_come = jnp.pad(last, ((0, 0), (0, size), (0, 0)))
    sums = fourier_convolution(to_come, kernel, causal=True)[:, size:] if size else last
    return y.astype(x.dtype), last, sums


def _following(x: Float[Array, "B U D"], kernel: Float[Array, "2*U D"]) -> Float[Array, "B U D"]:
    """What U inputs give to the U outputs after them."""
    size = x.shape[1]
    if size <= DIRECT:
        place = jnp.arange(size)
        return jnp.einsum("bid,jid->bjd", x, kernel[size + place[:, None] - place[None]])
    spectrum = jnp.fft.rfft(x, 2 * size, axis=1) * jnp.fft.rfft(kernel, axis=0)[None]
    return jnp.fft.irfft(spectrum, 2 * size, axis=1)[:, size:]


def _packed(x: Float[Array, "B T D"], kernel: Float[Array, "L D"], counts: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Tiles of all sizes over the whole sequence: of the left half of each what is of the segment at the border."""
    length, width = x.shape[1:]
    end = (1 << (length - 1).bit_length()) - length
    x = jnp.pad(x, ((0, 0), (0, end), (0, 0)))
    counts = jnp.pad(counts, ((0, 0), (0, end)), mode="edge")
    kernel = jnp.pad(kernel, ((0, max(0, length + end - len(kernel))), (0, 0)))
    y, size = kernel[0][None, None] * x, 1
    while 2 * size <= length + end:
        left = x.reshape(-1, 2 * size, width)[:, :size]
        ids = counts.reshape(-1, 2 * size)
        same = (ids == ids[:, size - 1 : size])[..., None]
        given = _following(jnp.where(same[:, :size], left, 0), kernel[: 2 * size])
        given = jnp.where(same[:, size:], given, 0)
        y = y + jnp.concatenate([jnp.zeros_like(given), given], axis=1).reshape(y.shape)
        size *= 2
    return y[:, :length]


def _step(x: Float[Array, "B D"], taps: Taps, state: ConvolutionState):
    """One output, and the tile that its input completes. `ready` is read where nothing is written: else XLA would copy
    all sums in every step."""
    size = state.inputs.shape[1]
    y = state.ready + taps(1).astype(x.dtype) * x
    inputs = lax.dynamic_update_slice_in_dim(state.inputs, x[:, None].astype(state.inputs.dtype), state.position, 1)
    after = state.position + 1
    level = lax.population_count((after & -after) - 1)

    def give(tile, sums):
        kernel = taps(2 * tile).astype(x.dtype)
        if tile == size:  # a new period
            return _following(inputs.astype(x.dtype), kernel)
        given = _following(lax.dynamic_slice_in_dim(inputs, after - tile, tile, 1).astype(x.dtype), kernel)
        given = given + lax.dynamic_slice_in_dim(sums, after, tile, 1)
        return lax.dynamic_update_slice_in_dim(sums, given, after, 1)

    sums = state.sums
    # One after the other, as each leaves the sums in place: a `switch` copies them, at 8,192 tokens ten times as slow.
    for n in range(size.bit_length()):
        sums = lax.cond(level == n, partial(give, 1 << n), lambda sums: sums, sums)
    after = after % size
    ready = lax.dynamic_slice_in_dim(sums, after, 1, 1)[:, 0]
    return y, ConvolutionState(inputs, sums, ready, after)
