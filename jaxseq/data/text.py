"""Bytes as tokens, and text as rows of them: batch `step` is a function of the step alone, so resuming is exact."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt8

from .corpus import Document, joined

BEGIN = 256
VOCABULARY = 257


class TextWindows:
    """Batches of `length` bytes to predict, shuffled by `seed`; an epoch uses each window once.

    Windowed: the documents lie end to end and are cut from an offset drawn per epoch; up to two windows' bytes at the
    ends stay unused in an epoch, and which ones changes with it. Packed: the documents lie in an order drawn per
    epoch, and each starts from BEGIN in a segment of its own; one that runs past its row goes on in another, from
    BEGIN again. Less than a row at the end of the epoch is left out. The draws are
    `numpy.random.default_rng((seed, epoch))`.

    Raises:
      ValueError: `length` or `batch_size` below 1, `seed` below 0, or less text than one window.
    """

    def __init__(self, documents: Sequence[Document], length: int, batch_size: int, seed: int, *, packed: bool = False):
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}={value}; choose {least} or more.")
        documents = [document for document in documents if document.content]
        self.text = _text(documents, length)
        self.sizes = np.array([len(document.content) for document in documents])
        self.length, self.batch_size, self.seed, self.packed = length, batch_size, seed, packed
        spare = 0 if packed else length - 1  # room for the offset
        self.windows = max(1, (len(self.text) - spare) // length)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)  # a batch may straddle two

    def batch(self, step: int) -> dict[str, Int32[np.ndarray, "B T"]]:
        """`inputs` and `targets`; packed, `segment_ids` too, counted from 0 in each row. Every position has a target.

        Raises:
          ValueError: `step` below 0.
        """
        if step < 0:
            raise ValueError(f"step={step}; choose 0 or more.")
        examples = range(step * self.batch_size, (step + 1) * self.batch_size)
        targets, owner = map(np.stack, zip(*map(self._row, examples), strict=True))
        inputs = with_begin(targets)
        inputs[:, 1:][owner[:, 1:] != owner[:, :-1]] = BEGIN
        batch = {"inputs": inputs, "targets": targets.astype(np.int32)}
        return batch | {"segment_ids": (owner - owner[:, :1]).astype(np.int32)} if self.packed else batch

    def _row(self, example: int) -> tuple[UInt8[np.ndarray, " T"], Int64[np.ndarray, " T"]]:
        """The bytes of an example, and which of the epoch's documents each belongs to."""
        order, ends, shift = self._epoch(example // self.windows)
        place = order[example % self.windows] * self.length + np.arange(self.length)
        owner = np.searchsorted(ends, place, side="right")
        return self.text[place + shift[owner]], owner

    def _draw(self, epoch: int) -> "_Epoch":
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.windows)
        if not self.packed:
            spare = len(self.text) - self.windows * self.length
            return _Epoch(order, np.array([], int), generator.integers(spare + 1, size=1))
        documents = generator.permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[documents])
        return _Epoch(order, ends, np.cumsum(self.sizes)[documents] - ends)


class _Epoch(NamedTuple):
    """The `order` windows are taken in, where the documents end in the epoch, and how far each lies from its text."""

    order: Int64[np.ndarray, " windows"]
    ends: Int64[np.ndarray, " documents"]
    shift: Int64[np.ndarray, " documents"]


def evaluation_windows(documents: Sequence[Document], length: int, most: int | None = None) -> UInt8[np.ndarray, "N T"]:
    """The text cut into windows in order, without overlap; a tail shorter than `length` is left out.

    Of more than `most` of them, as many that are evenly spread.

    Raises:
      ValueError: `length` or `most` below 1, or less text than one window.
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most}; choose 1 or more.")
    text = _text(documents, length)
    windows = text[: len(text) // length * length].reshape(-1, length)
    return windows[np.linspace(0, len(windows) - 1, min(most or len(windows), len(windows))).astype(int)]


def with_begin(targets: Integer[np.ndarray, "*B T"]) -> Int32[np.ndarray, "*B T"]:
    """What a model reads to predict `targets`: BEGIN, then all but the last.

    Raises:
      ValueError: a token outside the vocabulary.
    """
    inputs = np.roll(_checked(targets).astype(np.int32), 1, axis=-1)
    inputs[..., 0] = BEGIN
    return inputs


def masked(
    targets: Integer[np.ndarray, "*B T"], share: float, rng: np.random.Generator
) -> tuple[Int32[np.ndarray, "*B T"], Int32[np.ndarray, "*B T"]]:
    """Inputs with BEGIN in the place of a share of the tokens, and labels: what stood there, −100 elsewhere.

    Raises:
      ValueError: a token outside the vocabulary, or a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}; masked takes a number above 0 and below 1.")
    tokens = _checked(targets).astype(np.int32)  # in bytes BEGIN would be 0, and −100 a token
    hidden = rng.random(tokens.shape) < share
    return np.where(hidden, BEGIN, tokens), np.where(hidden, tokens, -100)


def encode(prompt: str) -> Int32[np.ndarray, " T"]:
    """A prompt as a model reads it: BEGIN, then the bytes of its UTF-8."""
    return np.array([BEGIN, *prompt.encode(errors="surrogateescape")], np.int32)


def decode(tokens: Integer[np.ndarray, " T"] | Sequence[int]) -> str:
    """The text of the tokens, BEGIN left out; bytes that are not UTF-8 become U+FFFD.

    Raises:
      ValueError: a token outside the vocabulary.
    """
    tokens = _checked(np.asarray(tokens, int))
    return tokens[tokens != BEGIN].astype(np.uint8).tobytes().decode(errors="replace")


def _checked(tokens: Integer[np.ndarray, "*T"]) -> Integer[np.ndarray, "*T"]:
    outside: Bool[np.ndarray, "*T"] = (tokens < 0) | (tokens >= VOCABULARY)
    if outside.any():
        raise ValueError(f"token {tokens[outside][0]} is outside the vocabulary; bytes are 0 … 255, BEGIN is {BEGIN}.")
    return tokens


def _text(documents: Sequence[Document], length: int) -> UInt8[np.ndarray, " N"]:
    text = np.frombuffer(joined(documents), np.uint8)
    if length < 1:
        raise ValueError(f"length={length}; choose 1 or more.")
    if len(text) < length:
        raise ValueError(
            f"the text has {len(text)} bytes, less than one window of length={length}; shorten it or add text."
        )
    return text
