"""Softmax attention with time split over devices: queries stay, keys and values go round a ring (arXiv 2310.01889).

A causal query of the last device sees all keys, one of the first device next to none. So each of n devices trades its
run of tokens for two half runs, number i from the front and number i from the back: then all have the same two blocks
of pairs to compute for the keys of every other device, and no block that causality masks away whole is computed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import Softmax, softmax
from ..scan import join_chunks, split_chunks
from ..shapes import accumulator
from ..sharded import AXIS, devices
from .visibility import Rules, faded

# Inside the ring halves lead: queries `2 B T/2 G R K`, keys and values `2 B T/2 G …`, both segments `2 B T/2` or None,
# and both sides of the fading, `2 B T/2 G R`, or None.


def ring_attention(q, k, v, segments, fading, rules: Rules, causal: bool, chunk_size: int):
    """The read-out `B T G R V` of queries `B T G R K`, keys and values `B T G …`, both segments `B T` or None."""
    if q.shape[1] % 2:
        raise ValueError(
            f"mesh axis {AXIS}={devices()} leaves {q.shape[1]} tokens a device; attention takes even runs: pad the "
            f"sequence to a multiple of {2 * devices()}."
        )
    ends = jax.tree.map(_to_both_ends, ((q, fading and fading[0]), (k, v, fading and fading[1]), segments))
    return _from_both_ends(_ring(rules, causal, chunk_size, *ends))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(rules, causal, chunk_size, queries, keys, segments):
    return _ring_forward(rules, causal, chunk_size, queries, keys, segments)[0]


def _ring_forward(rules, causal, chunk_size, queries, keys, segments):
    (q, _), (_, v, _), (q_ids, k_ids) = queries, keys, segments or (None, None)

    def meet(averages, message, device, a, b):
        at = _positions(device, q.shape[2], a, b)
        seen = _block(rules, chunk_size, at, *_half((queries, q_ids), a), *_half(message, b))
        return _update(averages, a, softmax.combine(_half(averages, a), seen)), message

    logits = jnp.zeros_like(q[..., 0], accumulator(q.dtype))
    values = jnp.broadcast_to(logits[..., None], (*logits.shape, v.shape[-1]))
    start = softmax.identity(Softmax(logits, logits, values))
    averages, _ = _around(causal, meet, start, (keys, k_ids))
    o = averages.average()
    total = jnp.where(averages.normaliser > 0, averages.maximum + jnp.log(averages.normaliser), 0)
    return o, (queries, keys, segments, o, total)


def _ring_backward(rules, causal, chunk_size, residuals, d_o):
    """Weights come again from the logarithm of their total; the adjoints of keys and values travel with them."""
    queries, keys, segments, o, total = residuals
    q_ids, k_ids = segments or (None, None)
    d_total = -jnp.sum(d_o * o, axis=-1)

    def meet(d_queries, message, device, a, b):
        (keys, k_ids), d_keys = message
        at = _positions(device, total.shape[2], a, b)
        (own, ids, maximum, *adjoints), (others, other_ids) = (
            _half((queries, q_ids, total, d_total, d_o), a),
            _half((keys, k_ids), b),
        )

        def block(queries, keys):
            seen = _block(rules, chunk_size, at, queries, ids, keys, other_ids, maximum)
            return seen.normaliser, seen.weighted_sum

        _, pull_back = jax.vjp(block, own, others)
        d_own, d_others = pull_back(tuple(adjoints))
        return _add(d_queries, a, d_own), (message[0], _add(d_keys, b, d_others))

    wide = lambda tree: jax.tree.map(lambda x: jnp.zeros_like(x, accumulator(x.dtype)), tree)
    d_queries, (_, d_keys) = _around(causal, meet, wide(queries), ((keys, k_ids), wide(keys)))
    like = lambda tree, other: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)
    return like(d_queries, queries), like(d_keys, keys), None


_ring.defvjp(_ring_forward, _ring_backward)


def _around(causal, meet, carry, message):
    """`meet(carry, message, device, a, b)` for every half a of the own queries and b of a device's keys that can see.

    The message starts as a device's own, comes past every device, and is back home in the end.
    """
    me, everything = lax.axis_index(AXIS), ((0, 0), (0, 1), (1, 0), (1, 1))

    def visit(carry, message, device, pairs):
        for a, b in pairs:
            carry, message = meet(carry, message, device, a, b)
        return carry, message

    def step(state, hops):
        carry, message = state
        device = (me - hops) % devices()
        # Late queries see all early keys; early queries the early keys of devices before, late ones the late after.
        same = jnp.where(device < me, 0, 1)
        return visit(carry, _onwards(message), device, ((1, 0), (same, same)) if causal else everything), None

    state = visit(carry, message, me, ((0, 0), (1, 0), (1, 1)) if causal else everything)
    (carry, message), _ = lax.scan(step, state, jnp.arange(1, devices(), dtype=jnp.int32))
    return carry, _onwards(message)


def _block(rules, chunk_size, at, queries, q_ids, keys, k_ids, maximum=None) -> Softmax:
    """What queries read from keys, a chunk at a time; weights are relative to `maximum`, the largest logit if None."""
    (k, v, of_keys), length = keys, queries[0].shape[1]
    chunk_size = min(chunk_size, length)

    @jax.checkpoint
    def chunk(some):
        (q, of_queries), positions, ids, maximum = some
        seen = rules.visible(positions[0], at[1], None if ids is None else (ids, k_ids))[:, :, None, None]
        logits = rules.capped(jnp.einsum("btgrk,bsgk->btgrs", q, k, preferred_element_type=accumulator(q.dtype)))
        lag = positions[0][:, None] - at[1][None]
        logits = faded(logits, of_queries and (of_queries, of_keys), lag, rules.ramp)
        logits = jnp.where(seen, logits, -jnp.inf)
        maximum = lax.stop_gradient(jnp.max(logits, axis=-1)) if maximum is None else maximum
        finite = jnp.where(jnp.isfinite(maximum), maximum, 0)[..., None]  # nothing seen: −∞ − (−∞) would be NaN
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, finite) - finite), 0)
        read = jnp.einsum("btgrs,bsgv->btgrv", weights.astype(v.dtype), v, preferred_element_type=weights.dtype)
        return Softmax(maximum, weights.sum(-1), read)

    some = split_chunks((queries, at[0][None], q_ids, maximum), chunk_size)
    return join_chunks(lax.map(chunk, some), length)


def _positions(device, length, a, b):
    """Of half a of the own queries, and of half b of a device's keys."""
    run = lambda device, half: jnp.where(half == 0, device, 2 * devices() - 1 - device) * length
    return tuple(
        run(*place) + jnp.arange(length, dtype=jnp.int32) for place in ((lax.axis_index(AXIS), a), (device, b))
    )


def _to_both_ends(x):
    """A run of tokens `B T …` on every device to half runs `2 B T/2 …`, number i from the front and from the back."""
    first, second = (lax.ppermute(half, AXIS, _ends(which)) for which, half in enumerate(jnp.split(x, 2, axis=1)))
    return jnp.stack(_crossed(first, second))


def _from_both_ends(x):
    halves = zip((0, 1), _crossed(x[0], x[1]), strict=True)
    back = lambda which: [(j, i) for i, j in _ends(which)]
    return jnp.concatenate([lax.ppermute(half, AXIS, back(which)) for which, half in halves], axis=1)


def _ends(which: int) -> list[tuple[int, int]]:
    """Where the first or second half of every device's run goes."""
    holders = [*range(devices()), *reversed(range(devices()))]
    return list(enumerate(holders[which::2]))


def _crossed(first, second):
    """In front of the sequence, even half runs are first halves; of an odd device the other way round."""
    even = lax.axis_index(AXIS) % 2 == 0
    return jnp.where(even, first, second), jnp.where(even, second, first)


def _onwards(message):
    return lax.ppermute(message, AXIS, [(i, (i + 1) % devices()) for i in range(devices())])


def _half(tree, which):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, which, 0, keepdims=False), tree)


def _update(tree, which, half):
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, which, 0), tree, half)


def _add(tree, which, half):
    return _update(tree, which, jax.tree.map(lambda x, y: x + y.astype(x.dtype), _half(tree, which), half))
