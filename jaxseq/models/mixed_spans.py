"""Full attention in a few layers, local attention in the others (MASFormer, arXiv 2310.12442).

    mixers = mixed_spans(Attention, partial(Attention, block_size=1024, look_back=1), every(6), num_layers=24)

A schedule tells from the number of layers which of them are full; a tuple of numbers does too. A local layer may be any
mixer, and the slots are those of any model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .block import Slot, Stack

Schedule = Callable[[int], tuple[int, ...]]
#: The local patterns: a block of its own, that and the one before, or a window of tokens before.
LOCAL = ("block_own", "block_prev", "window")


def bottom(count: int) -> Schedule:
    """The first layers."""
    return lambda num_layers: tuple(range(_at_most(count, num_layers)))


def middle(count: int) -> Schedule:
    """Layers around the middle; where they cannot be quite there, nearer to the first."""
    return lambda num_layers: tuple((num_layers - _at_most(count, num_layers)) // 2 + i for i in range(count))


def top(count: int) -> Schedule:
    """The last layers."""
    return lambda num_layers: tuple(num_layers - _at_most(count, num_layers) + i for i in range(count))


def every(period: int) -> Schedule:
    """The last of every `period` layers."""
    if period < 1:
        raise ValueError(f"period={period}; every takes 1 or more.")
    return lambda num_layers: tuple(range(period - 1, num_layers, period))


def mixed_spans(full: Slot, local: Slot, layers: Schedule | tuple[int, ...], *, num_layers: int) -> tuple[Slot, ...]:
    """One slot a layer: `full` in those `layers`, `local` in the others.

    Raises:
      ValueError: a layer outside 0 … num_layers − 1, or one that is named twice.
    """
    chosen = layers(num_layers) if callable(layers) else tuple(layers)
    if not all(0 <= layer < num_layers for layer in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={chosen}; take each once, of 0 to {num_layers - 1}.")
    return tuple(full if layer in chosen else local for layer in range(num_layers))


def rearranged(params: Mapping[str, Any], mixers: tuple[Slot, ...]) -> dict[str, Any]:
    """Parameters of a model with other slots, as the model with these `mixers` holds them.

    All slots of both have parameters of the same names and shapes, as `Attention` has with any span: so weights of a
    model with full attention load into every schedule. A model stacks the layers of each slot of its repeating pattern.

    Raises:
      ValueError: the parameters are of another number of layers, or of a model with `shared` ones, whose parameters are
        those of one period, whatever its number of layers.
    """
    period = len(Stack(1, mixers)._pattern()[0])

    def of_layers(blocks):
        apart = [blocks[f"block_{i}"] for i in range(len(blocks))]
        # Of a norm there is one scale a channel, and one axis more where layers are stacked.
        if any(norm["scale"].ndim == 1 for block in apart for name, norm in block.items() if name.endswith("_norm")):
            raise ValueError("params are of shared layers; rearranged takes those of a model with shared=False.")
        repeats = len(jax.tree.leaves(apart)[0])
        layers = [jax.tree.map(lambda x, at=at: x[at], block) for at in range(repeats) for block in apart]
        if len(layers) != len(mixers):
            raise ValueError(f"params are of {len(layers)} layers, mixers of {len(mixers)}.")
        stacked = lambda *parts: jnp.stack(parts)
        return {f"block_{i}": jax.tree.map(stacked, *layers[i::period]) for i in range(period)}

    def walk(tree):
        if not isinstance(tree, Mapping):
            return tree
        return of_layers(tree) if "block_0" in tree else {name: walk(part) for name, part in tree.items()}

    return walk(params)


def attention_cost(length: int, *, num_layers: int, num_full: int, local: str, span: int) -> float:
    """Scores computed, relative to full causal attention in all layers.

        l/L + (1 − l/L) · c        c = b/n (block_own), 3b/n (block_prev), 2w/n (window), at most 1

    for l = `num_full` of L layers, n tokens, and a `span` of b or w. The local patterns are counted as endless: at the
    start of a sequence they see less.

    Raises:
      ValueError: `local` is unknown, or a number is out of range.
    """
    _check(length, num_layers, num_full, local, span)
    share = min(1.0, {"block_own": 1, "block_prev": 3, "window": 2}[local] * span / length)
    return num_full / num_layers + (1 - num_full / num_layers) * share


def visible_pairs(length: int, *, local: str | None = None, span: int = 1) -> int:
    """Pairs of a query and a key that it sees in `length` tokens, exactly; `local` None is full causal attention.

        n (n + 1) / 2        block_own: Σ_blocks s (s + 1) / 2, and block_prev: b more for each of s queries after the
        first block        window: Σ_t min(t, w) + 1, from t = 0

    A head of K channels takes 2 K multiply-adds a pair, for the score and for the value.

    Raises:
      ValueError: `local` is unknown, or a number is below 1.
    """
    _check(length, 1, 0, local or "block_own", span)
    triangle = lambda n: n * (n + 1) // 2
    if local is None:
        return triangle(length)
    if local == "window":
        inside = min(length, span)
        return triangle(inside) + (length - inside) * (span + 1)
    blocks, rest = divmod(length, span)
    own = blocks * triangle(span) + triangle(rest)
    return own + (max(0, length - span) * span if local == "block_prev" else 0)


def cached_tokens(length: int, *, num_layers: int, num_full: int, local: str, span: int) -> int:
    """Tokens that the caches of all layers hold: l n + (L − l) · s, where s = b, 2b or w is at most n.

    Raises:
      ValueError: `local` is unknown, or a number is out of range.
    """
    _check(length, num_layers, num_full, local, span)
    return num_full * length + (num_layers - num_full) * min(length, span * (2 if local == "block_prev" else 1))


def _check(length: int, num_layers: int, num_full: int, local: str, span: int) -> None:
    if local not in LOCAL:
        raise ValueError(f"local={local!r} is unknown; choose one of {', '.join(LOCAL)}.")
    for name, value in (("length", length), ("num_layers", num_layers), ("span", span)):
        if value < 1:
            raise ValueError(f"{name}={value}; take 1 or more.")
    _at_most(num_full, num_layers)


def _at_most(count: int, num_layers: int) -> int:
    if not 0 <= count <= num_layers:
        raise ValueError(f"{count} full layers of {num_layers}; take 0 to {num_layers}.")
    return count
