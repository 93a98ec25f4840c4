"""A scan over depth that keeps no activations: its backward pass undoes each branch (arXiv 1707.04585, 2001.04451)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

#: (b, inputs of the layer, inputs of all layers) → (f(b), what else comes out)
Branch = Callable[[Any, Any, Any], tuple[Any, Any]]


def coupled_scan(
    branches: Sequence[Branch], streams: tuple[Any, Any], layers: Any, common: Any, length: int, *, undo: bool = True
) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    """In every layer, for every branch f in turn, two streams of one shape go

        (a, b) → (b, a + f(b))        undone by (b, c) → (c − f(b), b)

    so that two branches F and G make y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁). `layers` are the inputs of the `length` layers,
    led by their number, `common` those of all. The result is the streams, and for each branch what else came out of it
    in all layers; all of them trees of any arrays, of which the inexact ones have gradients.

    With `undo` the backward pass makes the inputs of a branch from its outputs: what stays from the forward pass are
    the last streams and the arguments. Each branch is computed twice, as in rematerialisation. What undoing rounds adds
    up over depth. Branches close over no array.
    """

    def forward(streams, layers, common):
        def layer(streams, inputs):
            outs = []
            for branch in branches:
                y, out = branch(streams[1], _merged(*inputs), _merged(*common))
                streams = streams[1], streams[0] + y
                outs.append(_parted(out))
            return streams, tuple(outs)

        return lax.scan(layer, streams, layers, length)

    def backward(residuals, cotangents):
        streams, layers, common = residuals
        d_streams, d_outs = cotangents

        def layer(carry, inputs):
            streams, d_streams, d_common = carry
            (layer, others), d_outs = inputs
            d_layer = jax.tree.map(jnp.zeros_like, layer)
            for branch, d_out in reversed(list(zip(branches, d_outs, strict=True))):
                b, c = streams

                def run(b, layer, shared, branch=branch, others=others):
                    y, out = branch(b, _merged(layer, others), _merged(shared, common[1]))
                    return y, _parted(out)[0]

                (y, _), pull_back = jax.vjp(run, b, layer, common[0])
                d_b, more, more_common = pull_back((d_streams[1], d_out))
                streams, d_streams = (c - y, b), (d_streams[1], d_streams[0] + d_b)
                d_layer, d_common = jax.tree.map(jnp.add, (d_layer, d_common), (more, more_common))
            return (streams, d_streams, d_common), d_layer

        start = streams, d_streams, jax.tree.map(jnp.zeros_like, common[0])
        (_, d_streams, d_common), d_layers = lax.scan(
            layer, start, (layers, tuple(floats for floats, _ in d_outs)), length, reverse=True
        )
        return d_streams, (d_layers, None), (d_common, None)

    def kept(streams, layers, common):
        streams, outs = forward(streams, layers, common)
        return (streams, outs), (streams, layers, common)

    run = jax.custom_vjp(forward)
    run.defvjp(kept, backward)
    streams, outs = (run if undo else forward)(streams, _parted(layers), _parted(common))
    return streams, tuple(_merged(*out) for out in outs)


def _parted(tree: Any) -> tuple[Any, Any]:
    """What has a gradient and what has none, each with None where the other is."""
    inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    floats = jax.tree.map(lambda x: x if inexact(x) else None, tree)
    return floats, jax.tree.map(lambda x: None if inexact(x) else x, tree)


def _merged(floats: Any, others: Any) -> Any:
    return jax.tree.map(lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None)
