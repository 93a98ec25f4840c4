"""A recurrence of every channel for itself, token by token, in one pass over memory: the state stays on the chip.

    h_t, y_t = token(h_{t-1}, fixed, rows_t)

`token` is plain arithmetic on states `N W`, on what is fixed in time `N W`, and on the rows of one token: `1 W` of the
channels, `1 N` of what all channels share. Its gradient is `jax.vjp` of it, from states computed again within a stride.
A program has W channels of one sequence: on a GPU all of their time, on a TPU a block of time after the other, which
comes while the one before is worked on.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .over_time import check_unchecked, tpu_parameters, triton_parameters
from .tiles import tile

Arrays = dict[str, jax.Array]
#: (states, fixed, rows) → (states, outputs)
Token = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]

#: Tokens between states that are kept: their states are in registers at once in the backward pass, and the code of a
#: stride is straight.
STRIDE = 16
#: Longer times are filled up to so many strides, whatever the platform; a TPU's blocks divide what they come to.
WHOLE = 8


def whole(length: int) -> int:
    """The length in whole strides, or eights of them."""
    unit = STRIDE * WHOLE if length > STRIDE * WHOLE else STRIDE
    return length + -length % unit


class Inputs(NamedTuple):
    """States `B N D`; rows `B T D` of the channels and `B T N` that they share; what is fixed, `N D`.

    T is a `whole` length; a GPU takes N that are powers of two. `flags` are shared rows without a gradient.
    """

    state: Arrays
    rows: Arrays
    shared: Arrays
    fixed: Arrays
    flags: Arrays


def by_token(token: Token, outputs: tuple[str, ...], reverse: bool, keep: bool, inputs: Inputs):
    """The last states, outputs `B T D` by name and, with `keep`, the states before each stride, `B T/stride N D`."""
    return _on_platforms(partial(_forward, token, outputs, reverse, keep), inputs)


def pulled_back(
    token: Token, reverse: bool, inputs: Inputs, kept: Arrays, d_state: Arrays, d_outputs: Arrays
) -> Inputs:
    """The gradients of all inputs, from the states that were kept."""
    return _on_platforms(partial(_backward, token, reverse), inputs, kept, d_state, d_outputs)


def _on_platforms(f, *args):
    check_unchecked(args)
    on = lambda platform, interpret=False: partial(f, partial(_call, platform, interpret))
    return lax.platform_dependent(*args, cpu=on("tpu", True), tpu=on("tpu"), cuda=on("gpu"))


def _width(platform: str, most: int, channels: int) -> int:
    """Channels of a program, no more than there are: whole lanes of a TPU, of a GPU what a warp reads in one go."""
    whole = -(-channels // 128) * 128 if platform == "tpu" else max(32, 1 << (channels - 1).bit_length())
    return min(most, whole)


def _forward(token: Token, outputs, reverse: bool, keep: bool, call, inputs: Inputs):
    def body(refs, written, h, strides):
        def stride(n, h):
            n = strides - 1 - n if reverse else n
            for name in written["kept"]:
                written["kept"][name][n] = h[name]
            for t in _tokens(n, reverse):
                h, out = token(h, _values(refs["fixed"]), _rows(refs, t))
                for name, y in out.items():
                    written["rows"][name][t, :] = y
            return h

        return lax.fori_loop(0, strides, stride, h)

    h, x = next(iter(inputs.state.values())), next(iter(inputs.rows.values()))
    strides = x.shape[1] // STRIDE
    kept = lambda h: jax.ShapeDtypeStruct((h.shape[0], strides, *h.shape[1:]), h.dtype)
    rows = {name: jax.ShapeDtypeStruct(x.shape, h.dtype) for name in outputs}
    reads = {"rows": inputs.rows, "shared": inputs.shared | inputs.flags, "fixed": inputs.fixed}
    writes = {"rows": rows, "kept": jax.tree.map(kept, inputs.state) if keep else {}}
    state, written = call(body, reverse, inputs.state, reads, writes)
    return state, written["rows"], written["kept"]


def _backward(token: Token, reverse: bool, call, inputs: Inputs, kept: Arrays, d_state: Arrays, d_outputs: Arrays):
    def body(refs, written, carry, strides):
        fixed = _values(refs["fixed"])

        def stride(n, carry):
            n = n if reverse else strides - 1 - n
            d_h, d_fixed = carry
            h, pulls = {name: ref[n] for name, ref in refs["kept"].items()}, []
            for t in _tokens(n, reverse):
                rows = _rows(refs, t)
                flags = {name: rows.pop(name) for name in inputs.flags}
                advance = lambda h, fixed, rows, flags=flags: token(h, fixed, rows | flags)
                (h, _), pull = jax.vjp(advance, h, fixed, rows)
                pulls.append((t, pull))
            for t, pull in reversed(pulls):
                d_out = {name: ref[t, :] for name, ref in refs["d_outputs"].items()}
                d_h, d, d_rows = pull((d_h, d_out))
                d_fixed = jax.tree.map(jnp.add, d_fixed, d)
                for name, value in d_rows.items():
                    written["rows" if name in written["rows"] else "partial"][name][t, :] = value
            return d_h, d_fixed

        d_h, d_fixed = lax.fori_loop(0, strides, stride, (carry["state"], carry["fixed"]))
        return {"state": d_h, "fixed": d_fixed}

    batch = next(iter(inputs.state.values())).shape[0]
    carry = {"state": d_state, "fixed": {k: jnp.zeros((batch, *x.shape), x.dtype) for k, x in inputs.fixed.items()}}
    shared = inputs.shared | inputs.flags
    reads = {"rows": inputs.rows, "shared": shared, "fixed": inputs.fixed, "kept": kept, "d_outputs": d_outputs}
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    writes = {"rows": jax.tree.map(like, inputs.rows), "partial": jax.tree.map(like, inputs.shared)}
    carry, written = call(body, not reverse, carry, reads, writes)
    # What all channels, or all sequences, share has a part from each program.
    shared = {name: jnp.sum(x, axis=1) for name, x in written["partial"].items()}
    fixed = {name: jnp.sum(x, axis=0) for name, x in carry["fixed"].items()}
    return Inputs(carry["state"], written["rows"], shared, fixed, jax.tree.map(jnp.zeros_like, inputs.flags))


def _tokens(stride, reverse: bool) -> list:
    """Where the tokens of a stride are, in the order of the recurrence; as slices: values stay two-dimensional."""
    order = range(STRIDE - 1, -1, -1) if reverse else range(STRIDE)
    return [pl.ds(stride * STRIDE + r, 1) for r in order]


def _values(refs):
    return {name: ref[...] for name, ref in refs.items()}


def _rows(refs, t) -> Arrays:
    return {name: ref[t, :] for name, ref in (refs["rows"] | refs["shared"]).items()}


def _call(platform: str, interpret: Any, body: Callable, reverse: bool, carry, reads, writes):
    """`body(refs, refs to write, carry, strides) -> carry` in one program for W channels of a sequence, or several in a
    row for as many blocks of time."""
    channels = jax.tree.leaves(carry)[0].shape[-1]
    chosen = tile("by_token", platform, max(x.shape[-2] for x in jax.tree.leaves(carry)))
    W = _width(platform, chosen["width"], channels)
    batch, length = next(iter(reads["rows"].values())).shape[:2]
    strides, parts = length // STRIDE, -(-channels // W)
    most = chosen.get("strides", strides)
    block = strides if strides <= most else math.gcd(strides, most)
    blocks, tokens = strides // block, block * STRIDE
    at = lambda i: blocks - 1 - i if reverse else i
    forms = {
        "rows": lambda x: pl.BlockSpec((None, tokens, W), lambda b, j, i: (b, at(i), j)),
        "shared": lambda x: pl.BlockSpec((None, tokens, x.shape[-1]), lambda b, j, i: (b, at(i), 0)),
        "partial": lambda x: pl.BlockSpec((None, None, tokens, x.shape[-1]), lambda b, j, i: (b, j, at(i), 0)),
        "kept": lambda x: pl.BlockSpec((None, block, x.shape[-2], W), lambda b, j, i: (b, at(i), 0, j)),
        "fixed": lambda x: pl.BlockSpec((x.shape[-2], W), lambda b, j, i: (0, j)),
        "carry": lambda x: pl.BlockSpec((None, x.shape[-2], W), lambda b, j, i: (b, 0, j)),
    }
    forms["d_outputs"] = forms["rows"]
    of_channels = forms.keys() - {"shared", "partial"}

    def filled(kind, x):
        fill = [(0, 0)] * (x.ndim - 1) + [(0, parts * W - channels)]
        return jnp.pad(x, fill) if kind in of_channels else x

    def result(kind, x):
        shape = {"partial": (batch, parts, *x.shape[1:])}.get(kind, (*x.shape[:-1], parts * W))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def kernel(start, refs, final, written):
        load = lambda refs: jax.tree.map(lambda ref: ref[...], refs)
        if blocks > 1:  # the last carry's place holds it from block to block

            @pl.when(pl.program_id(2) == 0)
            def _():
                jax.tree.map(lambda ref, value: ref.__setitem__(..., value), final, load(start))

        after = body(refs, written, load(final if blocks > 1 else start), block)
        jax.tree.map(lambda ref, value: ref.__setitem__(..., value), final, after)

    over = lambda tree, f: {kind: {name: f(kind, x) for name, x in arrays.items()} for kind, arrays in tree.items()}
    spec = lambda kind, x: forms[kind](x)
    at_carry = lambda f: jax.tree.map(lambda x: f("carry", x), carry)
    parameters = tpu_parameters("parallel", "parallel", "arbitrary") if platform == "tpu" else triton_parameters(chosen)
    final, written = pl.pallas_call(
        kernel,
        grid=(batch, parts, blocks),
        in_specs=[at_carry(spec), over(reads, spec)],
        out_specs=[at_carry(spec), over(writes, spec)],
        out_shape=[at_carry(result), over(writes, result)],
        compiler_params=parameters,
        interpret=interpret,
    )(at_carry(filled), over(reads, filled))
    cut = lambda kind, x: x[..., :channels] if kind in of_channels else x
    return jax.tree.map(lambda x: cut("carry", x), final), over(written, cut)
