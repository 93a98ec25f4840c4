"""Which tiles and which compiler a kernel by token gets, and arrays that are filled up to them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import mosaic_gpu
from .channel_blocks import OF_ALL_CHANNELS, Blocks, by_kind, in_grid
from .platforms import tpu_parameters, triton_parameters
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
    """Those of a platform; `interpret` is False, True, or how Mosaic's kernels for GPUs are interpreted."""

    platform: str
    interpret: Any = False

    def splits(self, name: str, carry, reads) -> int:
        """In how many parts a sequence is walked at once by the kernel of this name."""
        batch, length, states, channels = _sizes(carry, reads)
        chosen = self._chosen(name, carry, reads)
        programs = batch * -(-channels // chosen["width"])
        return how_many(chosen.get("programs", 1), programs, length // stride(states), walks=2)

    def __call__(self, name: str, body: Callable, reverse: bool, carry, reads, writes):
        """The last carry and what a body of `channel_blocks` wrote, with the tiles of the kernel of this name.

        `reads` and `writes` are arrays by kind and name.
        """
        batch, length, states, channels = _sizes(carry, reads)
        size, dtype = stride(states), jax.tree.leaves(carry)[0].dtype
        strides, chosen, ahead = length // size, self._chosen(name, carry, reads), False
        lanes, powers = lambda n: -(-n // 128) * 128, lambda n: 1 << (n - 1).bit_length()
        if self.platform == "tpu":  # one block of time comes while the one before is worked on
            most, W = chosen["strides"], min(chosen["width"], lanes(channels))
            walk = partial(in_grid, parameters=tpu_parameters("parallel", "parallel", "arbitrary"))
        elif "steps" in chosen:
            most, W, walk = 1, chosen["width"], partial(mosaic_gpu.in_pipeline, steps=chosen["steps"])
        else:  # a program of Triton has all of its sequence's time
            most, W, ahead = strides, min(chosen["width"], powers(channels)), bool(chosen["ahead"])
            walk = partial(in_grid, parameters=triton_parameters(chosen))
        parts, block = -(-channels // W), strides if strides <= most else math.gcd(strides, most)
        blocks = Blocks(parts, W, strides // block, block, size, reverse, ahead)

        # A TPU keeps rows of narrow numbers in pairs, and does not take one of them.
        stored = lambda x: dtype if self.platform == "tpu" else x.dtype

        def filled(kind, x):
            fill = [(0, 0)] * (x.ndim - 1) + [(0, parts * W - channels)]
            return jnp.pad(x.astype(stored(x)), 0 if kind in OF_ALL_CHANNELS else fill)

        def result(kind, x):
            shape = (batch, parts, *x.shape[1:]) if kind in OF_ALL_CHANNELS else (*x.shape[:-1], parts * W)
            return jax.ShapeDtypeStruct(shape, stored(x))

        reads, results = by_kind(filled, {"carry": carry} | reads), by_kind(result, {"carry": carry} | writes)
        written = walk(body, blocks, batch, reads, results, interpret=self.interpret)
        written = by_kind(lambda kind, x: x if kind in OF_ALL_CHANNELS else x[..., :channels], written)
        return written.pop("carry"), jax.tree.map(lambda x, like: x.astype(like.dtype), written, writes)

    def known(self, f: Callable) -> Callable:
        """f of primitives that the platform's compilers know."""
        return mosaic_gpu.with_known_sums(f) if self.platform == "gpu" else f

    def _chosen(self, name: str, carry, reads) -> dict[str, int]:
        """The tiles of this kernel; or of Mosaic's pipeline on a GPU, with its `steps`, where that takes the kernel."""
        alone = not any(reads[kind] for kind in ("shared", "fixed"))
        single = all(x.shape[1] == 1 and x.dtype == jnp.float32 for x in jax.tree.leaves(carry))
        fitting = alone and single and mosaic_gpu.fills(_sizes(carry, reads)[3])
        if self.platform == "gpu" and fitting and mosaic_gpu.compiles():
            chosen = tile("in_pipeline", "gpu", 1)
            if chosen["steps"]:
                return chosen | {"width": mosaic_gpu.THREADS}
        return tile(name, self.platform, _sizes(carry, reads)[2])


def _sizes(carry, reads) -> tuple[int, int, int, int]:
    """Batch, length, states of a channel, channels."""
    *_, states, channels = jax.tree.leaves(carry)[0].shape
    return *next(iter(reads["rows"].values())).shape[:2], states, channels
