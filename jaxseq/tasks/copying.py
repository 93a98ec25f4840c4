"""Tasks of keeping: what is to be copied among blanks, all of a sequence, and what followed a token."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Int
from .draws import IGNORED, distinct, integers, require


def selective_copying(
    key: Array, *, num_examples: int, length: int = 4096, num_tokens: int = 16, vocab_size: int = 16
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: `num_tokens` random letters among blanks, to be repeated in order at the end.

    The letters stand anywhere before the token `vocab_size` − 1; the `num_tokens` blanks (`vocab_size` − 2) after it
    have the letters as labels (Mamba, arXiv 2312.00752, section 4.1.1; MAD, arXiv 2403.17844). Chance is
    1 / (`vocab_size` − 2).

    Raises:
      ValueError: a number is too small, or the letters do not fit twice.
    """
    least = {"vocab_size": 3}
    sizes = dict(num_examples=num_examples, length=length, num_tokens=num_tokens, vocab_size=vocab_size)
    require("selective_copying", least, **sizes)
    if length < 2 * num_tokens + 1:
        raise ValueError(f"length={length}; num_tokens={num_tokens} twice and the sign between take more.")
    k_letters, k_places = jax.random.split(key)
    before = length - num_tokens - 1
    letters = integers(k_letters, (num_examples, num_tokens), 0, vocab_size - 2)
    places = jnp.sort(distinct(k_places, jnp.zeros(before), (num_examples, num_tokens)), axis=1)
    inputs = jnp.full((num_examples, length), vocab_size - 2, jnp.int32).at[:, before].set(vocab_size - 1)
    labels = jnp.full((num_examples, length), IGNORED, jnp.int32).at[:, before + 1 :].set(letters)
    return inputs.at[jnp.arange(num_examples)[:, None], places].set(letters), labels


def compression(
    key: Array, *, num_examples: int, length: int = 32, vocab_size: int = 16
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: random letters, then the token `vocab_size` − 1, whose output alone says all of them.

    The labels are the letters at their own places: a decoder answers for place t from t and the model's output at the
    last token, into which everything has to be compressed (MAD, arXiv 2403.17844). The last label is −100. Chance is
    1 / (`vocab_size` − 1).

    Raises:
      ValueError: a number is too small.
    """
    least = {"length": 2, "vocab_size": 2}
    require("compression", least, num_examples=num_examples, length=length, vocab_size=vocab_size)
    letters = integers(key, (num_examples, length), 0, vocab_size - 1)
    return letters.at[:, -1].set(vocab_size - 1), letters.at[:, -1].set(IGNORED)


def induction(
    key: Array, *, num_examples: int, length: int = 256, vocab_size: int = 16
) -> tuple[Int[Array, "N T"], Int[Array, "N T"]]:
    """`(inputs, labels)`: random letters, the token `vocab_size` − 1 among them and again at the end.

    The label at the end is the letter that followed it the first time; nothing else is asked (H3, arXiv 2212.14052,
    section 3.1; Mamba, arXiv 2312.00752, section 4.1.2). Chance is 1 / (`vocab_size` − 1).

    Raises:
      ValueError: a number is too small.
    """
    least = {"length": 3, "vocab_size": 2}
    require("induction", least, num_examples=num_examples, length=length, vocab_size=vocab_size)
    k_letters, k_place = jax.random.split(key)
    rows = jnp.arange(num_examples, dtype=jnp.int32)
    letters = integers(k_letters, (num_examples, length), 0, vocab_size - 1)
    place = integers(k_place, (num_examples,), 0, length - 2)
    labels = jnp.full((num_examples, length), IGNORED, jnp.int32).at[:, -1].set(letters[rows, place + 1])
    return letters.at[rows, place].set(vocab_size - 1).at[:, -1].set(vocab_size - 1), labels
