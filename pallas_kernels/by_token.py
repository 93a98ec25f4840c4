"""A recurrence of every channel for itself, token by token, in one pass over memory: the state stays on the chip.

    h_t, y_t = token(h_{t-1}, fixed, rows_t)

`token` is plain arithmetic on states `N W`, on what is fixed in time `N W`, and on the rows of one token: `1 W` of the
channels, `1 N` of what all channels share. Its gradient is `jax.vjp` of it, from states computed again within a stride.

Where sequences are too few for the processors there are, time is split.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .channel_programs import Programs, stride
from .platforms import check_unchecked
from .splits import Affine, Splits

Arrays = dict[str, jax.Array]
#: (states, fixed, rows) → (states, outputs)
Token = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]


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
    on = lambda *which: partial(f, Programs(*which))
    return lax.platform_dependent(*args, cpu=on("tpu", True), tpu=on("tpu"), cuda=on("gpu"))


def _forward(token: Token, outputs, reverse: bool, keep: bool, on: Programs, inputs: Inputs):
    size, dtype = _stride_and_dtype(inputs)

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

    moving, fixed = _moving(inputs), {"fixed": inputs.fixed}
    splits = Splits(on.splits("by_token", inputs.state, moving | fixed), reverse)
    reads = splits.apart(moving) | fixed
    advance = lambda h, fixed, row, _: token(h, fixed, row)[0]
    walk = partial(_walk, "by_token", on, reverse, advance, reads | {"d_outputs": {}})
    h = splits.starts(walk, _apply, _compose, inputs.state)
    x = next(iter(reads["rows"].values()))
    kept = lambda h: jax.ShapeDtypeStruct((h.shape[0], x.shape[1] // size, *h.shape[1:]), h.dtype)
    writes = {
        "rows": {name: jax.ShapeDtypeStruct(x.shape, dtype) for name in outputs},
        "kept": jax.tree.map(kept, h) if keep else {},
    }
    h, written = on("by_token", body, reverse, h, reads, writes)
    return splits.end(h), splits.together(written["rows"]), splits.together(written["kept"])


def _backward(
    token: Token, reverse: bool, on: Programs, inputs: Inputs, kept: Arrays, d_state: Arrays, d_outputs: Arrays
):
    size, dtype = _stride_and_dtype(inputs)

    def body(refs, written, carry, over_strides):
        fixed = _values(refs["fixed"])

        def step(n, moving, carry):
            h, tokens, pulls, found = _values(refs["kept"], n), _tokens(n, size, reverse), [], []
            rows, d_outputs = moving
            for row, beside in zip(rows, _rows(dtype, refs["shared"], tokens), strict=True):
                flags = {name: beside.pop(name) for name in inputs.flags}
                advance = lambda h, fixed, row, flags=flags: token(h, fixed, row | flags)
                (h, _), pull = jax.vjp(advance, h, fixed, row | beside)
                pulls.append(on.known(pull))
            d_h, d_fixed = carry["state"], carry["fixed"]
            for pull, d_out in zip(reversed(pulls), reversed(d_outputs), strict=True):
                d_h, d, d_row = pull((d_h, d_out))
                d_fixed = jax.tree.map(jnp.add, d_fixed, d)
                found.append(d_row)
            _write(written["rows"] | written["partial"], reversed(tokens), found)
            return {"state": d_h, "fixed": d_fixed}

        return over_strides(_reader(dtype, refs, size, reverse), step, carry)

    def pull(d_h, fixed, row, d_out):
        anywhere = jax.tree.map(jnp.zeros_like, d_h)  # an affine map has one derivative
        return on.known(jax.vjp(lambda h: token(h, fixed, row), anywhere)[1])((d_h, d_out))[0]

    moving, fixed = _moving(inputs), {"fixed": inputs.fixed}
    splits = Splits(on.splits("by_token_backward", inputs.state, moving | fixed), not reverse)
    reads = splits.apart(moving | {"d_outputs": d_outputs}) | fixed
    d_h = splits.starts(partial(_walk, "by_token_backward", on, not reverse, pull, reads), _apply, _compose, d_state)
    sequences = next(iter(d_h.values())).shape[0]
    d_fixed = {name: jnp.zeros((sequences, *x.shape), x.dtype) for name, x in inputs.fixed.items()}
    like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
    reads |= {"kept": splits.apart(kept)}
    writes = {
        "rows": {name: like(x, x.dtype) for name, x in reads["rows"].items()},
        "partial": {name: like(reads["shared"][name], dtype) for name in inputs.shared},
    }
    carry, written = on("by_token_backward", body, not reverse, {"state": d_h, "fixed": d_fixed}, reads, writes)
    # What all channels, or all sequences, share has a part from each program.
    d_shared = splits.together({name: jnp.sum(x, axis=1) for name, x in written["partial"].items()})
    d_shared = {name: x.astype(inputs.shared[name].dtype) for name, x in d_shared.items()}
    d_fixed = {name: jnp.sum(x, axis=0) for name, x in carry["fixed"].items()}
    d_flags = jax.tree.map(jnp.zeros_like, inputs.flags)
    return Inputs(splits.end(carry["state"]), splits.together(written["rows"]), d_shared, d_fixed, d_flags)


# ---- splits ---------------------------------------------------------------------------------------------------------


def _walk(name: str, on: Programs, reverse: bool, advance: Callable, reads, start: Arrays) -> Affine:
    """Where walks end from zero, and from the unit state of each kind; `start` are states of this shape.

    `advance(state, fixed, row, row of d_outputs)` is an affine map.
    """
    size, dtype = stride(next(iter(start.values())).shape[1]), next(iter(start.values())).dtype

    def body(refs, _, carry, over_strides):
        fixed = _values(refs["fixed"])

        def step(n, moving, carry):
            rows, others = moving
            tokens = _rows(dtype, refs["shared"], _tokens(n, size, reverse))
            for row, other, token in zip(rows, others, tokens, strict=True):
                after, push = jax.linearize(lambda h, at=(row | token, other): advance(h, fixed, *at), carry["zero"])
                carry = {"zero": after, "units": {kind: on.known(push)(h) for kind, h in carry["units"].items()}}
            return carry

        return over_strides(_reader(dtype, refs, size, reverse), step, carry)

    constant = lambda value: lambda h: jnp.full_like(h, value)
    zero = jax.tree.map(constant(0), start)
    units = {kind: zero | {kind: constant(1)(h)} for kind, h in start.items()}
    ends, _ = on(name, body, reverse, {"zero": zero, "units": units}, reads, {"rows": {}})
    return Affine(**ends)


def _apply(units: dict[str, Arrays], h: Arrays) -> Arrays:
    """Kinds of states mix, as the two planes of complex numbers do. Nothing is nothing however it would have grown."""
    times = lambda h, unit: jnp.where(h == 0, 0, h * unit)
    parts = [jax.tree.map(partial(times, h[kind]), unit) for kind, unit in units.items()]
    return reduce(partial(jax.tree.map, jnp.add), parts)


def _compose(second: dict[str, Arrays], first: dict[str, Arrays]) -> dict[str, Arrays]:
    return {kind: _apply(second, h) for kind, h in first.items()}


# ---- rows -----------------------------------------------------------------------------------------------------------


def _stride_and_dtype(inputs: Inputs):
    """All is computed in the dtype of the states."""
    h = next(iter(inputs.state.values()))
    return stride(h.shape[1]), h.dtype


def _moving(inputs: Inputs) -> dict[str, Arrays]:
    return {"rows": inputs.rows, "shared": inputs.shared | inputs.flags}


def _tokens(n, size: int, reverse: bool) -> list:
    """Where the tokens of a stride are, in the order of the recurrence; as slices: values stay two-dimensional."""
    order = range(size - 1, -1, -1) if reverse else range(size)
    return [pl.ds(n * size + r, 1) for r in order]


def _values(refs, at=...) -> Arrays:
    return {name: ref[at] for name, ref in refs.items()}


def _rows(dtype, refs, tokens) -> list[Arrays]:
    return [{name: ref[t, :].astype(dtype) for name, ref in refs.items()} for t in tokens]


def _reader(dtype, refs, size: int, reverse: bool) -> Callable:
    """The rows and cotangents of a stride."""

    def read(n):
        tokens = _tokens(n, size, reverse)
        return _rows(dtype, refs["rows"], tokens), _rows(dtype, refs["d_outputs"], tokens)

    return read


def _write(refs, tokens, rows: list[Arrays]) -> None:
    """After all that is read: no compiler moves a read before a write to what may be the same place."""
    for t, row in zip(tokens, rows, strict=True):
        for name, value in row.items():
            refs[name][t, :] = value.astype(refs[name].dtype)
