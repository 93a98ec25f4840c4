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

#: Times are filled up to a multiple, and longer ones to one that is worth a TPU's block.
SHORT, LONG = 16, 128


def whole(length: int) -> int:
    return length + -length % (LONG if length > LONG else SHORT)


def stride(states: int) -> int:
    """Tokens between states that are kept, of so many states a channel: the states of a stride are in registers at once
    in the backward pass, and its code is straight."""
    return 16 if states == 1 else 8


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
    whole = -(-channels // 128) * 128 if platform == "tpu" else 1 << (channels - 1).bit_length()
    return min(most, whole)


def _forward(token: Token, outputs, reverse: bool, keep: bool, call, inputs: Inputs):
    states, dtype = _of(inputs.state)
    size = stride(states)

    def body(refs, written, h, over_strides):
        fixed = _values(refs["fixed"])

        def step(n, rows, h):
            for name in written["kept"]:
                written["kept"][name][n] = h[name]
            tokens, out = _tokens(n, size, reverse), []
            for row, beside in zip(rows, _rows(dtype, refs["shared"], tokens), strict=True):
                h, y = token(h, fixed, row | beside)
                out.append(y)
            _write(written["rows"], tokens, out)
            return h

        return over_strides(lambda n: _rows(dtype, refs["rows"], _tokens(n, size, reverse)), step, h)

    x = next(iter(inputs.rows.values()))
    strides = x.shape[1] // size
    kept = lambda h: jax.ShapeDtypeStruct((h.shape[0], strides, *h.shape[1:]), h.dtype)
    rows = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name in outputs}
    reads = {"rows": inputs.rows, "shared": inputs.shared | inputs.flags, "fixed": inputs.fixed}
    writes = {"rows": rows, "kept": jax.tree.map(kept, inputs.state) if keep else {}}
    state, written = call("by_token", body, reverse, inputs.state, reads, writes)
    return state, written["rows"], written["kept"]


def _backward(token: Token, reverse: bool, call, inputs: Inputs, kept: Arrays, d_state: Arrays, d_outputs: Arrays):
    states, dtype = _of(inputs.state)
    size = stride(states)

    def body(refs, written, carry, over_strides):
        fixed = _values(refs["fixed"])

        def read(n):
            tokens = _tokens(n, size, reverse)
            return _rows(dtype, refs["rows"], tokens), _rows(dtype, refs["d_outputs"], tokens)

        def step(n, moving, carry):
            h, tokens, pulls, found = _values(refs["kept"], n), _tokens(n, size, reverse), [], []
            rows, d_outputs = moving
            for row, beside in zip(rows, _rows(dtype, refs["shared"], tokens), strict=True):
                flags = {name: beside.pop(name) for name in inputs.flags}
                advance = lambda h, fixed, row, flags=flags: token(h, fixed, row | flags)
                (h, _), pull = jax.vjp(advance, h, fixed, row | beside)
                pulls.append(pull)
            d_h, d_fixed = carry["state"], carry["fixed"]
            for pull, d_out in zip(reversed(pulls), reversed(d_outputs), strict=True):
                d_h, d, d_row = pull((d_h, d_out))
                d_fixed = jax.tree.map(jnp.add, d_fixed, d)
                found.append(d_row)
            _write(written["rows"] | written["partial"], reversed(tokens), found)
            return {"state": d_h, "fixed": d_fixed}

        return over_strides(read, step, carry)

    batch = next(iter(inputs.state.values())).shape[0]
    carry = {"state": d_state, "fixed": {k: jnp.zeros((batch, *x.shape), x.dtype) for k, x in inputs.fixed.items()}}
    shared = inputs.shared | inputs.flags
    reads = {"rows": inputs.rows, "shared": shared, "fixed": inputs.fixed, "kept": kept, "d_outputs": d_outputs}
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    writes = {
        "rows": {name: like(x, x.dtype) for name, x in inputs.rows.items()},
        "partial": {name: like(x, dtype) for name, x in inputs.shared.items()},
    }
    carry, written = call("by_token_backward", body, not reverse, carry, reads, writes)
    # What all channels, or all sequences, share has a part from each program.
    shared = {name: jnp.sum(x, axis=1).astype(inputs.shared[name].dtype) for name, x in written["partial"].items()}
    fixed = {name: jnp.sum(x, axis=0) for name, x in carry["fixed"].items()}
    return Inputs(carry["state"], written["rows"], shared, fixed, jax.tree.map(jnp.zeros_like, inputs.flags))


def _of(state: Arrays):
    """How many states a channel has, and the dtype that all is computed in."""
    h = next(iter(state.values()))
    return h.shape[-2], h.dtype


def _tokens(n, size: int, reverse: bool) -> list:
    """Where the tokens of a stride are, in the order of the recurrence; as slices: values stay two-dimensional."""
    order = range(size - 1, -1, -1) if reverse else range(size)
    return [pl.ds(n * size + r, 1) for r in order]


def _values(refs, at=...) -> Arrays:
    return {name: ref[at] for name, ref in refs.items()}


def _rows(dtype, refs, tokens) -> list[Arrays]:
    return [{name: ref[t, :].astype(dtype) for name, ref in refs.items()} for t in tokens]


def _write(refs, tokens, rows: list[Arrays]) -> None:
    """After all that is read: no compiler moves a read before a write to what may be the same place."""
    for t, row in zip(tokens, rows, strict=True):
        for name, value in row.items():
            refs[name][t, :] = value.astype(refs[name].dtype)


def _call(platform: str, interpret: Any, name: str, body: Callable, reverse: bool, carry, reads, writes):
    """`body(refs, refs to write, carry, over_strides) -> carry` in one program for W channels of a sequence, or several
    in a row for as many blocks of time; tiles are those of the kernel of this name."""
    *_, states, channels = jax.tree.leaves(carry)[0].shape
    chosen = tile(name, platform, states)
    W = _width(platform, chosen["width"], channels)
    batch, length = next(iter(reads["rows"].values())).shape[:2]
    size, parts = stride(states), -(-channels // W)
    strides = length // size
    most = chosen.get("strides", strides)
    block = strides if strides <= most else math.gcd(strides, most)
    blocks, tokens = strides // block, block * size
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

    # A TPU keeps rows of narrow numbers in pairs, and does not take one of them.
    stored = lambda x: jax.tree.leaves(carry)[0].dtype if platform == "tpu" else x.dtype

    def filled(kind, x):
        fill = [(0, 0)] * (x.ndim - 1) + [(0, parts * W - channels)]
        return jnp.pad(x.astype(stored(x)), fill if kind in of_channels else 0)

    def result(kind, x):
        shape = {"partial": (batch, parts, *x.shape[1:])}.get(kind, (*x.shape[:-1], parts * W))
        return jax.ShapeDtypeStruct(shape, stored(x))

    def over_strides(read, step, carry):
        """`step(n, read(n), carry)` from stride to stride."""
        place = lambda n: block - 1 - n if reverse else n
        if chosen.get("stages", 1) == 1:
            return lax.fori_loop(0, block, lambda n, carry: step(place(n), read(place(n)), carry), carry)

        def ahead(n, state):
            here, carry = state
            following = read(place(jnp.minimum(n + 1, block - 1)))  # on its way while the program works
            return following, step(place(n), here, carry)

        return lax.fori_loop(0, block, ahead, (read(place(0)), carry))[1]

    def kernel(start, refs, final, written):
        load = lambda refs: jax.tree.map(lambda ref: ref[...], refs)
        if blocks > 1:  # the last carry's place holds it from block to block

            @pl.when(pl.program_id(2) == 0)
            def _():
                jax.tree.map(lambda ref, value: ref.__setitem__(..., value), final, load(start))

        after = body(refs, written, load(final if blocks > 1 else start), over_strides)
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
    written = jax.tree.map(lambda x, like: x.astype(like.dtype), over(written, cut), writes)
    return jax.tree.map(lambda x: cut("carry", x), final), written
