"""Programs that walk through time with W channels of a sequence each, and what they carry on the chip."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .channel_walks import Blocks, in_grid, in_pipeline, over
from .platforms import has_mosaic_gpu, tpu_parameters, triton_parameters
from .splits import how_many
from .tiles import tile


def whole(length: int) -> int:
    """What times are filled up to, by 15 tokens or a sixteenth: blocks of a TPU and splits of a GPU divide it."""
    unit = 1 << max(4, (length // 16).bit_length() - 1)
    return length + -length % unit


def stride(states: int) -> int:
    """Tokens between states that are kept, of so many states a channel: the states of a stride are in registers at once
    in the backward pass, and its code is straight."""
    return 16 if states == 1 else 8


class Programs(NamedTuple):
    """Those of a platform, compiled or interpreted."""

    platform: str
    interpret: Any = False

    def splits(self, name: str, batch: int, length: int, states: int, channels: int) -> int:
        """In how many parts a sequence is walked at once by the kernel of this name."""
        chosen = tile(name, self.platform, states)
        programs = batch * -(-channels // chosen["width"])
        return how_many(chosen.get("programs", 1), programs, length // stride(states), walks=2)

    def __call__(self, name: str, body: Callable, reverse: bool, carry, reads, writes):
        """The last carry and what was written, of a body of `channel_walks`, with the tiles of the kernel of this name.

        `reads`, `writes` are arrays by kind and name. A TPU walks in blocks of time, which come while the one before is
        worked on; so does a GPU where Mosaic can; a program of Triton has all of its sequence's time.
        """
        *_, states, channels = jax.tree.leaves(carry)[0].shape
        batch, length = next(iter(reads["rows"].values())).shape[:2]
        chosen, size, on_tpu = tile(name, self.platform, states), stride(states), self.platform == "tpu"
        lone = not any(reads[kind] for kind in ("shared", "fixed")) and jax.tree.leaves(carry)[0].dtype == jnp.float32
        steps = chosen["steps"] if not on_tpu and lone and has_mosaic_gpu() else 0

        # Whole lanes of a TPU or threads of a warp group; Triton knows powers of two.
        filled_up = lambda n: -(-n // 128) * 128 if on_tpu or steps else 1 << (n - 1).bit_length()
        W = min(map(filled_up, (chosen["width"], channels)))
        parts, strides = -(-channels // W), length // size
        most = chosen["strides"] if on_tpu else 1 if steps else strides
        block = strides if strides <= most else math.gcd(strides, most)
        blocks = Blocks(parts, W, strides // block, block, size, reverse)

        # A TPU keeps rows of narrow numbers in pairs, and does not take one of them.
        stored = lambda x: jax.tree.leaves(carry)[0].dtype if on_tpu else x.dtype
        of_channels = lambda kind: kind not in ("shared", "partial")

        def filled(kind, x):
            fill = [(0, 0)] * (x.ndim - 1) + [(0, parts * W - channels)]
            return jnp.pad(x.astype(stored(x)), fill if of_channels(kind) else 0)

        def result(kind, x):
            shape = (*x.shape[:-1], parts * W) if of_channels(kind) else (batch, parts, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, stored(x))

        each = lambda f, carry, arrays: (jax.tree.map(lambda x: f("carry", x), carry), over(arrays, f))
        call = body, blocks, each(filled, carry, reads), each(result, carry, writes)
        if steps:
            final, written = in_pipeline(*call, steps, self.interpret)
        elif on_tpu:
            final, written = in_grid(*call, 0, tpu_parameters("parallel", "parallel", "arbitrary"), self.interpret)
        else:
            final, written = in_grid(*call, chosen["ahead"], triton_parameters(chosen), self.interpret)
        final, written = each(lambda kind, x: x[..., :channels] if of_channels(kind) else x, final, written)
        return final, jax.tree.map(lambda x, like: x.astype(like.dtype), written, writes)
