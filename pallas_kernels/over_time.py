"""A step over blocks of time, with a matrix carried from one to the next, for every sequence and head.

    for each batch b, head h:   for each block i of `size` tokens (from the last one, in reverse):
        carry, outputs[i] = step(carry, blocks of tokens, matrices of the block)

A TPU does just that. A GPU has too many processors for it, and goes through time for the carries alone.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax

from .over_time_on_gpu import walker_of_gpu
from .over_time_on_tpu import on_tpu
from .platforms import check_unchecked
from .tiles import tile
from .walk import Walker
from .within_chunk import matrix_width


def on_platforms(f: Callable, table: str, length: int, size: int | None, *arrays):
    """`f(walker, block size, *arrays)` on the platform the program is lowered for; a CPU interprets the TPU's kernel.

    `table` is the one that tiles are chosen from. A block is a power of two, 16 at least.

    Raises:
      NotImplementedError: as `check_unchecked`.
    """
    check_unchecked(arrays)
    widest = max(x.shape[-1] for x in jax.tree.leaves(arrays))
    of_tpu, of_gpu = (tile(table, platform, widest) for platform in ("tpu", "gpu"))
    on = lambda chosen, walker: partial(f, walker, matrix_width(size or min(chosen["block"], length)))
    cpu, tpu, gpu = Walker(partial(on_tpu, interpret=True)), Walker(on_tpu), walker_of_gpu(of_gpu)
    return lax.platform_dependent(*arrays, cpu=on(of_tpu, cpu), tpu=on(of_tpu, tpu), cuda=on(of_gpu, gpu))
