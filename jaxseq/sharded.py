"""Time split over devices: each holds a run of consecutive tokens, and what passes between them is O(state).

Inside `jax.shard_map` with the mesh axis `sequence` manual, the arrays of a device are its part of the sequence: the
ops of `jaxseq.ops` find that out from here, and so does every mixer made of them. Outside, time is whole and the
functions of this file change nothing. States, given and returned, are those of the whole sequence, on every device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .monoid import Monoid
from .scan import check_monoid, flipped

#: The mesh axis that time is split over.
AXIS = "sequence"


def is_split() -> bool:
    """Whether the code being traced sees a device's part of the time alone."""
    return AXIS in jax.sharding.get_abstract_mesh().manual_axes


def check_whole(op: str, instead: str) -> None:
    """Raise where an op that needs all of the time sees a part of it.

    Raises:
      NotImplementedError: time is split; the message says what to do instead.
    """
    if is_split():
        raise NotImplementedError(f"{op} cannot run with time split over mesh axis {AXIS}; {instead}.")


def devices() -> int:
    """How many devices time is split over."""
    return jax.sharding.get_abstract_mesh().shape[AXIS] if is_split() else 1


def own(tree):
    """The arrays as ones that differ from device to device, which the carry of a scan has to be from its start."""
    if not is_split():
        return tree
    same = lambda x: AXIS not in _varying(x)
    return jax.tree.map(lambda x: lax.pcast(x, AXIS, to="varying") if same(x) else x, tree)


def largest_anywhere(x: jax.Array) -> jax.Array:
    """The largest entry on any device, of whatever is split: a loop that ends by it ends everywhere at once."""
    axes = _varying(x)
    return lax.pmax(jnp.max(x), axes) if axes else jnp.max(x)


def _varying(x) -> tuple[str, ...]:
    """The manual mesh axes along which an array differs from device to device."""
    return tuple(jax.typeof(x).manual_axis_type.varying)


def first_position(length: int) -> jax.Array:
    """The place in the sequence of this device's first token, where each device holds `length` of them."""
    return lax.axis_index(AXIS) * length if is_split() else jnp.zeros((), jnp.int32)


def sharded(monoid: Monoid, elements, initial_state, *, reverse: bool = False) -> tuple[Any, Any]:
    """The form of `scan` for a part of the time: scan alone, exchange totals, let the prefixes act.

    Takes and returns what they do, of this device's tokens; the states are those of the whole sequence.
    """
    check_monoid(monoid, elements, initial_state)
    prefixes = lax.associative_scan(monoid.combine, flipped(elements) if reverse else elements, axis=1)
    last = lambda tree: jax.tree.map(lambda x: x[:, -1], tree)

    def run(state):
        states = monoid.act(prefixes, jax.tree.map(lambda s: s[:, None], state))
        return states, last(states)

    states, final = across_devices(monoid, lambda: last(prefixes), run, initial_state, reverse=reverse)
    return flipped(states) if reverse else states, final


def across_devices(
    monoid: Monoid, total: Callable[[], Any], run: Callable[[Any], tuple[Any, Any]], state, *, reverse: bool = False
) -> tuple[Any, Any]:
    """`run(state) -> (out, final state)` on a part of the sequence, made to run on the whole of it.

    `total()` is the element that all tokens of this device compose to. A device then runs from the state that the
    devices before it leave, and the final state is that of the last one.
    """
    if not is_split():
        return run(state)
    out, final = run(monoid.act(_before(monoid, total(), reverse), state))
    return out, on_last(final, reverse=reverse)


def _before(monoid: Monoid, total, reverse: bool):
    """The composition of the totals of all devices before this one.

    By doubling: log₂ n messages of one element each, where gathering the totals would bring n of them to each device.
    """
    identity = monoid.identity(total)
    arriving = lambda element, hops: _choose(_place(reverse) >= hops, _shift(element, hops, reverse), identity)
    before, hops = arriving(total, 1), 1
    while hops < devices() - 1:
        before = monoid.combine(arriving(before, hops), before)
        hops *= 2
    return before


def on_last(tree, *, reverse: bool = False):
    """What the device with the last tokens holds (the first, in reverse), on every device."""
    if not is_split():
        return tree
    last = _place(reverse) == devices() - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(last, x, jnp.zeros_like(x)), AXIS), tree)


def halo(x: jax.Array, before: jax.Array, *, reverse: bool = False) -> jax.Array:
    """The tokens `B W …` in front of x `B T …`: the last W of the device before; `before` on the first device.

    Raises:
      ValueError: a device holds fewer than W tokens.
    """
    reach, length = before.shape[1], x.shape[1]
    if not is_split():
        return before
    if reach > length:
        raise ValueError(
            f"mesh axis {AXIS}={devices()} leaves {length} tokens a device, a window reaches {reach} back; "
            f"split time over at most {max(1, devices() * length // reach)}."
        )
    return jnp.where(_place(reverse) == 0, before, _shift(x[:, length - reach :], 1, reverse))


def over_channels(function: Callable, x: jax.Array, *others: jax.Array):
    """`function(x, *others)` of x `B T D` whole in time: each device computes all times of its share of the channels.

    The last axis of the others is of the channels too. What it returns beside the outputs is put together on every
    device.

    Raises:
      ValueError: the devices do not divide the channels.
    """
    share = x.shape[-1] // devices()
    if not is_split():
        return function(x, *others)
    if x.shape[-1] % devices():
        raise ValueError(f"x has {x.shape[-1]} channels, which mesh axis {AXIS}={devices()} does not divide.")
    whole = lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)
    own = lambda a: lax.dynamic_slice_in_dim(a, lax.axis_index(AXIS) * share, share, axis=-1)
    found = function(whole, *map(own, others))
    y, *rest = found if isinstance(found, tuple) else (found,)
    y = lax.all_to_all(y, AXIS, split_axis=1, concat_axis=2, tiled=True)
    if not isinstance(found, tuple):
        return y
    # A sum of shares that are zero elsewhere is known to be the same on every device; what is gathered is not.
    place = lambda a: lax.dynamic_update_slice_in_dim(
        jnp.zeros((*a.shape[:-1], x.shape[-1]), a.dtype), a, lax.axis_index(AXIS) * share, axis=-1
    )
    return y, *(lax.psum(place(a), AXIS) for a in rest)


def sum_over_time(x: jax.Array) -> jax.Array:
    """The sum of x over the devices that time is split over."""
    return lax.psum(x, AXIS) if is_split() else x


def _place(reverse: bool) -> jax.Array:
    index = lax.axis_index(AXIS)
    return devices() - 1 - index if reverse else index


def _shift(tree, hops: int, reverse: bool):
    """Every device's tree to the device `hops` later."""
    later = [(i, i + hops) for i in range(devices() - hops)]
    return lax.ppermute(tree, AXIS, [(j, i) for i, j in later] if reverse else later)


def _choose(flag, chosen, other):
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), chosen, other)
