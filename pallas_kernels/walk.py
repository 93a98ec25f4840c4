"""A walk over blocks of time, with a matrix carried from one to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .within_chunk import WithinChunk

Arrays = dict[str, jax.Array]
#: carry `K V`, tokens `C W`, matrices `K V` → carry, outputs `C W`.
Step = Callable[[WithinChunk, jax.Array, Arrays, Arrays], tuple[jax.Array, Arrays]]
Result = tuple[jax.Array, Arrays, jax.Array | None]  # carry, outputs, carries


class Walk(NamedTuple):
    """What is walked over, and how: tokens `B T H W`, matrices `B N H K V` of N = T / size blocks, a carry `B H K V`.

    Tokens may have fewer heads, each for a run of those of the carry. `outputs` are widths and dtypes of outputs
    `B T H W`, or of one row a block, as the tokens of that name are. `columns` names the tokens and outputs that lie
    along the columns of the carry; all others are sums over these.
    With `keep` the carries before each block are returned, in the form of matrices; a GPU has them in memory anyway, in
    `carries_dtype`, or that of the carry. The arithmetic of a step that takes derivatives is `differentiated`.
    """

    size: int
    outputs: dict[str, tuple[int, Any]]
    columns: tuple[str, ...] = ()
    reverse: bool = False
    keep: bool = False
    carries_dtype: Any = None
    differentiated: bool = False

    def place(self, i, blocks: int):
        return blocks - 1 - i if self.reverse else i


class Sweep(NamedTuple):
    """`step(within, tokens) -> outputs` of a part of a block's channels, of which `sums` are summed over all parts.

    `finish(within, sums, known)` takes these. What it returns is known to the sweeps that follow, beside their tokens;
    of the last sweep it is an output.
    """

    step: Callable[..., Arrays]
    sums: tuple[str, ...] = ()
    finish: Callable[..., Arrays] = lambda within, sums, known: sums


class Walker(NamedTuple):
    """`walk(step, path, carry, tokens, matrices)` is a platform's way through time, `step` given its arithmetic first.

    Where it pays to make beforehand what no carry is needed for, `each(sweeps, size, channels, tokens, whole)` are the
    outputs of sweeps over so many channels, of all blocks at once; tokens that are `whole` do not lie along channels,
    and every part sees all of them. Outputs of one row are one of each block: an array `B N H W`, which goes with the
    tokens then.
    """

    walk: Callable[..., Result]
    each: Callable[..., Arrays] | None = None


def filled_width(own: int, channels: int, fit: Callable[[int], int]) -> int:
    """One channel that all others share stays one."""
    return own if own == 1 < channels else fit(own)


def filled_up(walked: Callable, fit: Callable, walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
    """What is `walked`, with heads that are as wide as `fit` makes of their width: channels of zeros, cut off again."""
    K, V = carry.shape[2:]
    width = lambda name, own: filled_width(own, V if name in walk.columns else K, fit)
    fill = lambda x, *widths: jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + [(0, w) for w in widths])
    filled = lambda x: fill(x, fit(K) - K, fit(V) - V)
    carry, matrices = filled(carry), {name: filled(x) for name, x in matrices.items()}
    tokens = {name: fill(x, width(name, x.shape[3]) - x.shape[3]) for name, x in tokens.items()}
    wide = walk._replace(outputs={name: (width(name, w), dtype) for name, (w, dtype) in walk.outputs.items()})
    final, outputs, carries = walked(wide, carry, tokens, matrices)
    cut = {name: outputs[name][..., :width] for name, (width, _) in walk.outputs.items()}
    return final[..., :K, :V], cut, None if carries is None else carries[..., :K, :V]
