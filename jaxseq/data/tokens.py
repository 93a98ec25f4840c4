"""Text as tokens of a byte-pair encoding that is made from it, and rows of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from ..train.files import atomically
from .corpus import Document
from .epochs import epoch_rows


def byte_pairs(documents: Sequence[Document], vocabulary: int, path: str | os.PathLike[str]) -> Any:
    """A `tokenizers.Tokenizer` of `vocabulary` tokens made from the documents, kept at `path`; read where it is there.

    Raises:
      ImportError: tokenizers is not installed.
      ValueError: `vocabulary` is below 257.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    except ImportError:
        raise ImportError("tokenizers is not installed: pip install jaxseq[huggingface].") from None
    if vocabulary < 257:
        raise ValueError(f"vocabulary={vocabulary}; byte pairs take 257 or more: 256 bytes are tokens already.")
    if not Path(path).exists():
        made = ByteLevelBPETokenizer()
        made.train_from_iterator(map(_text, documents), vocab_size=vocabulary, show_progress=False)
        with atomically(Path(path)) as temporary:
            made.save(str(temporary))
    return Tokenizer.from_file(str(path))


def encoded(tokenizer: Any, documents: Sequence[Document]) -> list[Int32[np.ndarray, " T"]]:
    """The tokens of each document."""
    return [np.array(tokenizer.encode(_text(document)).ids, np.int32) for document in documents]


def whole_windows(
    documents: Sequence[Int32[np.ndarray, " T"]], length: int
) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, " N"]]:
    """All windows of `length` that lie inside a document, without overlap, and which document each is of.

    Raises:
      ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length={length}; choose 1 or more.")
    cut = [tokens[: len(tokens) // length * length].reshape(-1, length) for tokens in documents]
    return np.concatenate(cut), np.repeat(np.arange(len(cut), dtype=np.int32), [len(rows) for rows in cut])


def token_batches(
    stream: Int32[np.ndarray, " T"], length: int, batch_size: int, seed: int
) -> Callable[[int], dict[str, Int32[np.ndarray, "B T"]]]:
    """`step -> inputs and targets` of a stream cut into windows, each epoch in an order of its own.

    Raises:
      ValueError: there are fewer windows than one batch takes.
    """
    count = (len(stream) - 1) // length
    places = epoch_rows(count, batch_size, seed, of=f"windows of length={length}")

    def batch(step: int) -> dict[str, np.ndarray]:
        rows = stream[places(step)[:, None] * length + np.arange(length + 1)]
        return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}

    return batch


def _text(document: Document) -> str:
    return document.content.decode(errors="replace")
