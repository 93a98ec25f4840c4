"""Which keys a query sees, how they fade from it, and the softmax over them: for softmax and path attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..monoid import Expansion, expansion
from ..scan import parallel as scan
from ..shapes import Array
from ..sharded import is_split, sharded

#: The position of a key that is not there: nothing sees it.
NOWHERE = -(2**30)


class Rules(NamedTuple):
    """What a query may see, how its logits are capped, and how soon a span ends, as in `softmax_attention`."""

    visible: Callable
    capped: Callable = lambda logits: logits
    ramp: float = 1.0


class Fading(NamedTuple):
    """Why keys fade from a query, `B T G R` of every token: by log decays between the two, and beyond a span."""

    total: Expansion | None  # sums of log decays so far
    span: Array | None  # of queries alone


def faded(logits, fading, lag, ramp: float, queries: int = 1):
    """Logits `B T G R S`, or those with queries along another axis, less what keys at a lag `T S` have faded."""
    if fading is None:
        return logits
    (totals, span), (others, _) = fading
    added = lambda x: jnp.moveaxis(x, 1, queries).astype(logits.dtype)
    if totals is not None:
        gap = jax.tree.map(lambda q, k: q[..., None] - jnp.moveaxis(k, 1, -1)[:, None], totals, others)
        logits = logits + added(gap.high + gap.low)
    if span is not None:
        left = 1 + (span[..., None] - lag.astype(span.dtype)[None, :, None, None]) / ramp
        slope = (left > 0) & (left < 1)
        logits = logits + added(jnp.where(left > 0, jnp.log(jnp.where(slope, left, 1)), -jnp.inf))
    return logits


def visible(causal, window, look_back, query_positions, key_positions, segments):
    """Which keys `S` each query `T` may see, `1|B T S`."""
    lag = query_positions[:, None] - key_positions[None, :]
    seen = key_positions[None, :] > NOWHERE
    seen &= (lag >= 0) | (not causal)
    if window is not None:
        seen &= jnp.abs(lag) < window
    seen = seen[None]
    if segments is not None:
        own, other = segments[0][:, :, None], segments[1][:, None, :]
        seen = seen & (own == other if look_back == 0 else (own - look_back <= other) & (other <= own))
    return seen


def averaged(logits, v, positions, segments, fading, rules):
    """Values of what each query may see, by the softmax of its logits `B G R T S`."""
    logits = faded(logits, fading, positions[0][:, None] - positions[1][None], rules.ramp, queries=3)
    mask = rules.visible(*positions, segments)[:, None, None]
    # A query that sees nothing has a zero row, and no NaN in its gradient.
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=-1), 0)
    return jnp.einsum("bgrts,bsgv->btgrv", weights.astype(v.dtype), v, preferred_element_type=logits.dtype)


def running_sum(x, across: bool) -> Expansion:
    """Sums over the tokens so far, of all devices or of this one."""
    start = Expansion(jnp.zeros_like(x[:, 0]), jnp.zeros_like(x[:, 0]))
    run = sharded if is_split() and across else scan
    return run(expansion, Expansion(x, jnp.zeros_like(x)), start)[0]


def check_heads(key: Array, heads: int) -> None:
    """Raise unless key heads serve runs of query heads."""
    if heads % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which do not divide the {heads} of query.")


def check_lengths(op: str, queries: int, keys: int, name: str = "key") -> None:
    """Raise unless the queries are the last ones of the keys' tokens."""
    if not 1 <= queries <= keys:
        raise ValueError(f"query has {queries} positions and {name} {keys}; {op} takes 1 ≤ T ≤ S.")


def check_segments(segment_ids: Array | None, key_segment_ids: Array | None, queries: int, keys: int) -> None:
    """Raise where segments are known of the queries alone."""
    if segment_ids is not None and key_segment_ids is None and queries != keys:
        raise ValueError(f"segment_ids of {queries} queries say nothing of {keys} keys; pass key_segment_ids too.")
