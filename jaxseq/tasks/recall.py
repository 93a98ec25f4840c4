"""Associative recall: pairs of a key and a value in the context, then keys whose values are asked."""

import math

import jax
import jax.numpy as jnp

from ..shapes import Array, Int
from .draws import IGNORED, distinct, first_of, integers, require


def mqar(
    key: Array,
    *,
    num_examples: int,
    length: int = 64,
    num_pairs: int = 4,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = True,
    num_passes: int = 1,
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)` of multi-query associative recall (Zoology, arXiv 2312.04927, and its authors' generator).

        k_1 v_1 k_2 v_2 … k_D v_D   then every key once more, in one of S slots of two tokens

    D = `num_pairs` distinct keys are drawn from 1 … V/2 − 1 and as many distinct values from V/2 … V − 1. The context
    comes `num_passes` times. Key i is asked at the first token of a slot, drawn without replacement with probability
    proportional to a (s + 1)^(a − 1) for a = `power`: 0.01 asks soon after the context, 1 anywhere. There the label is
    v_i. Everything else is the filler 0, or with `random_non_queries` a random token, which may be a key by accident.

    Chance is 1 / D for a model that answers with any value of the context, 2 / V for any value.

    Raises:
      ValueError: a number is too small, the length is odd, or the pairs do not fit into length or vocabulary.
    """
    sizes = dict(num_examples=num_examples, length=length, num_pairs=num_pairs, vocab_size=vocab_size)
    require("mqar", {}, **sizes, num_passes=num_passes)
    if not 0 < power < math.inf:
        raise ValueError(f"power={power}; mqar takes a finite number above 0.")
    if length % 2:
        raise ValueError(f"length={length}; mqar takes an even one: pairs and slots are two tokens long.")
    if vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size}; mqar takes more than length={length}.")
    if 2 * num_pairs * (num_passes + 1) > length:
        raise ValueError(
            f"num_pairs={num_pairs}: {num_passes} times the pairs, and the slots to ask for them, need "
            f"{2 * num_pairs * (num_passes + 1)} tokens of length={length}."
        )
    half = vocab_size // 2  # more keys than num_pairs: vocab_size > length >= 4 num_pairs
    k_keys, k_values, k_slots, k_filler = jax.random.split(key, 4)
    num_slots = length // 2 - num_pairs * num_passes
    shape = (num_examples, num_pairs)
    keys = 1 + distinct(k_keys, jnp.zeros(half - 1), shape)
    values = half + distinct(k_values, jnp.zeros(vocab_size - half), shape)
    slots = distinct(k_slots, (power - 1) * jnp.log(jnp.arange(1.0, num_slots + 1)), shape)
    inputs, labels = mqar_rows(keys, values, slots, length=length, num_passes=num_passes)
    if random_non_queries:
        inputs = jnp.where(inputs == 0, integers(k_filler, inputs.shape, 0, vocab_size), inputs)
    return inputs, labels


def mqar_rows(
    keys: Int[Array, "N D"], values: Int[Array, "N D"], slots: Int[Array, "N D"], *, length: int, num_passes: int = 1
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """The rows of `mqar` for what was drawn: the context, and key i in slot i after it; 0 elsewhere."""
    context = jnp.tile(jnp.stack([keys, values], axis=-1).reshape(len(keys), -1), (1, num_passes))
    rows, asked = jnp.arange(len(keys))[:, None], context.shape[1] + 2 * slots
    inputs = jnp.zeros((len(keys), length), jnp.int32).at[:, : context.shape[1]].set(context)
    labels = jnp.full((len(keys), length), IGNORED, jnp.int32)
    return inputs.at[rows, asked].set(keys), labels.at[rows, asked].set(values)


def associative_recall(
    key: Array, *, num_examples: int, length: int = 128, vocab_size: int = 20
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: pairs of a random map, the token `vocab_size` − 1, a key whose value is the last label.

    The letters below `vocab_size` − 1 are keys in their first half and values in the second. Pairs are of random keys,
    which come again with the same value; the key at the end is any of those that came (H3, arXiv 2212.14052, section
    3.1; at `length` 128 to 131,072, Orchid, arXiv 2402.18508). Chance is 1 over the number of values.

    Raises:
      ValueError: a number is too small, or the length is odd.
    """
    require(
        "associative_recall",
        {"length": 4, "vocab_size": 3},
        num_examples=num_examples,
        length=length,
        vocab_size=vocab_size,
    )
    if length % 2:
        raise ValueError(f"length={length}; associative_recall takes an even one: pairs, the question, a key.")
    k_map, k_pairs, k_asked = jax.random.split(key, 3)
    num_keys, num_pairs = (vocab_size - 1) // 2, length // 2 - 1
    values = integers(k_map, (num_examples, num_keys), num_keys, vocab_size - 1)
    keys = integers(k_pairs, (num_examples, num_pairs), 0, num_keys)
    came = jnp.zeros((num_examples, num_keys), bool).at[jnp.arange(num_examples)[:, None], keys].set(True)
    asked = jax.random.categorical(k_asked, jnp.where(came, 0.0, -jnp.inf)).astype(jnp.int32)[:, None]
    value_of = lambda keys: jnp.take_along_axis(values, keys, axis=1)
    pairs = jnp.stack([keys, value_of(keys)], axis=-1).reshape(num_examples, -1)
    question = jnp.full((num_examples, 1), vocab_size - 1, jnp.int32)
    labels = jnp.full((num_examples, length), IGNORED, jnp.int32).at[:, -1:].set(value_of(asked))
    return jnp.concatenate([pairs, question, asked], axis=1), labels


def noisy_recall(
    key: Array,
    *,
    num_examples: int,
    length: int = 128,
    vocab_size: int = 32,
    noise_vocab_size: int = 16,
    noise: float = 0.2,
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: pairs of a random map; a share `noise` of the pairs is two tokens that mean nothing instead.

    The last `noise_vocab_size` tokens are noise; the others are keys in their first half and values in the second. The
    label of a key that came before is its value, which is the next token; the last pair is always of such a key (MAD,
    arXiv 2403.17844, with its multiple queries). Chance is 1 over the number of values.

    Raises:
      ValueError: a number is too small, the length is odd, or `noise` is no share below 1.
    """
    least = {"length": 4, "vocab_size": noise_vocab_size + 2}
    sizes = dict(num_examples=num_examples, noise_vocab_size=noise_vocab_size)
    require("noisy_recall", least, **sizes, length=length, vocab_size=vocab_size)
    if length % 2:
        raise ValueError(f"length={length}; noisy_recall takes an even one: pairs are two tokens long.")
    if not 0 <= noise < 1:
        raise ValueError(f"noise={noise}; noisy_recall takes a share of the pairs, 0 or more and below 1.")
    k_keys, k_values, k_noisy, k_kept, k_noise, k_last = jax.random.split(key, 6)
    letters, num_pairs = vocab_size - noise_vocab_size, length // 2
    shape, index = (num_examples, num_pairs), jnp.arange(num_pairs, dtype=jnp.int32)[None]
    kept = integers(k_kept, (num_examples, 1), 0, num_pairs - 1)  # so that there is a key to ask for
    noisy = (jax.random.uniform(k_noisy, shape) < noise) & (index != kept) & (index < num_pairs - 1)
    keys = integers(k_keys, shape, 0, letters // 2)
    last = jax.random.categorical(k_last, jnp.where(noisy[:, :-1], -jnp.inf, 0.0)).astype(jnp.int32)[:, None]
    keys = keys.at[:, -1:].set(jnp.take_along_axis(keys, last, axis=1))
    first = first_of((keys[:, :, None] == keys[:, None, :]) & ~noisy[:, None, :])
    values = integers(k_values, shape, letters // 2, letters)
    values = jnp.take_along_axis(values, first, axis=1)
    pairs = jnp.stack([keys, values], axis=-1)
    inputs = jnp.where(noisy[..., None], integers(k_noise, pairs.shape, letters, vocab_size), pairs)
    asked = jnp.where((first < index) & ~noisy, values, IGNORED)
    labels = jnp.stack([asked, jnp.full_like(asked, IGNORED)], axis=-1)
    return inputs.reshape(num_examples, length), labels.reshape(num_examples, length)
