"""Recall of words: keys and values of one to three letters."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Int
from .draws import IGNORED, distinct, first_of, integers, require


def fuzzy_recall(
    key: Array,
    *,
    num_examples: int,
    length: int = 128,
    vocab_size: int = 16,
    key_sizes: tuple[int, int] = (1, 3),
    value_sizes: tuple[int, int] = (1, 3),
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: pairs of a random map from words to words, the letters of a word different.

    The last token is padding, in front; of the others the first half are letters of keys and the second of values, so
    that words end where the half changes. The size of a word is uniform from the first to the last of its `sizes`, and
    the word uniform among those of its size. Where a key came before, its value is asked, each letter at the token
    before it; the last pair is always of such a key (MAD, arXiv 2403.17844, with its multiple queries; its test has
    `key_sizes=(3, 3)`). Chance, letter by letter, is 1 over those that the value does not hold yet.

    Raises:
      ValueError: a number is too small, a word is longer than its alphabet, or two pairs are longer than `length`.
    """
    require("fuzzy_recall", {"vocab_size": 3}, num_examples=num_examples, length=length, vocab_size=vocab_size)
    for name, pair in (("key_sizes", key_sizes), ("value_sizes", value_sizes)):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise ValueError(f"{name}={pair!r}; fuzzy_recall takes the least and the largest size of a word.")
    half, most = (vocab_size - 1) // 2, key_sizes[1] + value_sizes[1]
    words = {"key_sizes": (key_sizes, half), "value_sizes": (value_sizes, vocab_size - 1 - half)}
    for name, (sizes, letters) in words.items():
        if not 1 <= sizes[0] <= sizes[1] <= letters:
            raise ValueError(f"{name}={sizes}; fuzzy_recall takes two numbers in order, from 1 to {letters} letters.")
    if length < 2 * most:
        raise ValueError(f"length={length}; two pairs of up to {most} letters take {2 * most}.")
    k_keys, k_values, k_key_sizes, k_value_sizes, k_last = jax.random.split(key, 5)
    num_pairs = (length - most) // (key_sizes[0] + value_sizes[0]) + 1
    shape, index = (num_examples, num_pairs), jnp.arange(num_pairs, dtype=jnp.int32)[None]
    key_letter, value_letter = (jnp.arange(most, dtype=jnp.int32)[None, None] for _, most in (key_sizes, value_sizes))
    keys = distinct(k_keys, jnp.zeros(half), (*shape, key_sizes[1]))
    values = half + distinct(k_values, jnp.zeros(vocab_size - 1 - half), (*shape, value_sizes[1]))
    key_size = integers(k_key_sizes, shape, key_sizes[0], key_sizes[1] + 1)
    value_size = integers(k_value_sizes, shape, value_sizes[0], value_sizes[1] + 1)
    keys = jnp.where(key_letter < key_size[..., None], keys, -1)
    first = first_of((keys[:, :, None] == keys[:, None]).all(axis=-1))
    values, value_size = _taken(values, first), _taken(value_size, first)
    # From the end: the last pair, then as many before it as there is room for.
    reach = (key_size + value_size)[:, -2::-1].cumsum(axis=1)[:, ::-1]
    kept = reach <= length - most
    last = jax.random.categorical(k_last, jnp.where(kept, 0.0, -jnp.inf)).astype(jnp.int32)[:, None]
    order = jnp.concatenate([jnp.broadcast_to(index[:, :-1], kept.shape), last], axis=1)
    keys, values, key_size, value_size = (_taken(a, order) for a in (keys, values, key_size, value_size))
    kept = jnp.pad(kept, ((0, 0), (0, 1)), constant_values=True)
    same = (keys[:, :, None] == keys[:, None]).all(axis=-1)
    asked = (same & kept[:, None] & (index[:, None] < index[..., None])).any(axis=-1) & kept
    reach = jnp.pad(reach, ((0, 0), (0, 1))) + (key_size + value_size)[:, -1:]
    key_at = (length - reach)[..., None] + key_letter
    value_at = (length - reach + key_size)[..., None] + value_letter
    in_key = kept[..., None] & (keys >= 0)
    in_value = kept[..., None] & (value_letter < value_size[..., None])
    inputs = jnp.full((num_examples, length), vocab_size - 1, jnp.int32)
    inputs = _put(_put(inputs, key_at, keys, in_key), value_at, values, in_value)
    labels = jnp.full((num_examples, length), IGNORED, jnp.int32)
    return inputs, _put(labels, value_at - 1, values, in_value & asked[..., None])


def _taken(a: Int[Array, "N P *W"], order: Int[Array, "N P"]) -> Int[Array, "N P *W"]:
    """The pairs in this order."""
    return jnp.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)


def _put(rows: Int[Array, "N T"], at: Int[Array, "N P W"], tokens: Int[Array, "N P W"], where) -> Int[Array, "N T"]:
    """The rows with tokens at these places, where there are any."""
    at = jnp.where(where, at, rows.shape[1])  # out of range: dropped
    return rows.at[jnp.arange(len(rows))[:, None, None], at].set(tokens, mode="drop")
