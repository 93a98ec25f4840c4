"""Sequences with one label each: digits as pixels, spoken digits as samples, and tables of ListOps."""

import csv
import gzip
import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..tasks.listops import VOCABULARY, padded
from .epochs import epoch_rows
from .table import DAMAGED, archive_text


class Labelled(NamedTuple):
    """Sequences, padded after their ends; `jax.device_put` brings them to a device."""

    inputs: np.ndarray  # N T F float32, or tokens N T int32
    labels: np.ndarray  # N int32
    lengths: np.ndarray  # N int32

    def take(self, rows) -> "Labelled":
        """The sequences of these rows, indices or a slice."""
        return Labelled(*(array[rows] for array in self))

    def batch(self, rows) -> dict[str, np.ndarray]:
        return self.take(rows)._asdict()

    def draw(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Inputs and labels of `count` sequences drawn with replacement; inside `jit` too."""
        rows = jax.random.randint(key, (count,), 0, len(self.labels))
        return jnp.asarray(self.inputs)[rows], jnp.asarray(self.labels)[rows]

    def batches(self, size: int, seed: int):
        """`step -> batch`, a function of the step alone: each epoch in an order of its own, whole batches.

        Raises:
          ValueError: there are fewer sequences than one batch takes.
        """
        rows = epoch_rows(len(self.labels), size, seed, of="sequences")
        return lambda step: self.batch(rows(step))


def mnist(folder: str | os.PathLike[str], *, pool: int = 1) -> tuple[Labelled, Labelled]:
    """Train and test digits, pixel after pixel: `N 784 1`, from the four idx files, which may be gzipped.

    `pool` p takes means of p × p pixels first. Pixels are shifted and scaled to mean 0 and variance 1 of the train set.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is no idx file, or `pool` does not divide the width of the images.
    """
    folder = Path(folder).expanduser()
    splits = []
    for split in ("train", "t10k"):
        images, labels = _idx(folder, f"{split}-images-idx3-ubyte", 3), _idx(folder, f"{split}-labels-idx1-ubyte", 1)
        size = images.shape[1]
        if pool < 1 or size % pool:
            raise ValueError(f"pool={pool} does not divide the {size} pixels of a row.")
        if len(images) != len(labels):
            raise ValueError(f"{folder} has {len(images)} {split} images and {len(labels)} labels.")
        cells = images.reshape(len(images), size // pool, pool, images.shape[2] // pool, pool)
        splits.append((cells.mean(axis=(2, 4), dtype=np.float32).reshape(len(images), -1, 1), labels.astype(np.int32)))
    mean, deviation = splits[0][0].mean(), splits[0][0].std() + 1e-6
    train, test = (_whole((pixels - mean) / deviation, labels) for pixels, labels in splits)
    return train, test


def spoken_digits(
    path: str | os.PathLike[str], *, length: int = 8192, keep_every: int = 1
) -> tuple[Labelled, Labelled]:
    """Train and test recordings of the Free Spoken Digit Dataset, raw samples at 8 kHz: `N T 1`.

    The file holds all samples end to end: `audio`, `offsets`, `digit`, `index`. Recordings 0 to 4 of each speaker and
    digit are the test set. The first `length` samples are taken, divided by the deviation of those to train on, and the
    mean of each `keep_every` kept: a lower sampling rate, where what is too fast for it is weaker and not folded down.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is damaged, lacks an array or has silence alone to train on, or a number is below 1.
    """
    path = Path(path).expanduser()
    path = path / "fsdd_recordings.npz" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name the recordings as one npz file.")
    if length < 1 or keep_every < 1:
        raise ValueError(f"length={length} and keep_every={keep_every} must be at least 1.")
    names = ("audio", "offsets", "digit", "index")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in names if name in file.files}
    except (zipfile.BadZipFile, TypeError, ValueError, *DAMAGED) as error:
        raise ValueError(f"{path} is no npz file of arrays ({type(error).__name__}).") from None
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path} has no array {missing[0]}.")
    audio, offsets, digits, index = (arrays[name] for name in names)
    kept = [audio[a : min(a + length, b)].astype(np.float32) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    train = np.concatenate([np.zeros(0), *(samples for samples, n in zip(kept, index, strict=True) if n > 4)])
    if not train.size or not (scale := train.std()) > 0:
        raise ValueError(f"{path} has no sound to train on, in recordings whose index is above 4.")
    inputs = np.zeros((len(kept), -(-length // keep_every), 1), np.float32)
    lengths = np.array([-(-len(samples) // keep_every) for samples in kept], np.int32)
    for row, count, samples in zip(inputs, lengths, kept, strict=True):
        blocks = np.arange(count) * keep_every
        sizes = np.minimum(blocks + keep_every, len(samples)) - blocks  # the last one may be shorter
        row[:count, 0] = np.add.reduceat(samples, blocks) / sizes / scale
    everything = Labelled(inputs, digits.astype(np.int32), lengths)
    return everything.take(index > 4), everything.take(index <= 4)


def listops_table(path: str | os.PathLike[str], *, test_share: float = 0.2) -> tuple[Labelled, Labelled]:
    """Train and test trees of a table `Source<TAB>Target`, which may be gzipped; the last share of it is for the test.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is no such table.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a table Source<TAB>Target.")
    tokens = {word: i for i, word in enumerate(VOCABULARY)}
    try:
        table = csv.DictReader(io.StringIO(archive_text(path), newline=""), delimiter="\t")
        rows = [(row["Source"], int(row["Target"])) for row in table]
        trees = [[tokens[word] for word in source.replace("(", "").replace(")", "").split()] for source, _ in rows]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of ListOps ({error!r}).") from None
    labels, lengths = np.array([target for _, target in rows], np.int32), np.array([*map(len, trees)], np.int32)
    everything, cut = Labelled(padded(trees), labels, lengths), round(len(rows) * (1 - test_share))
    return everything.take(slice(cut)), everything.take(slice(cut, None))


def _whole(inputs: np.ndarray, labels: np.ndarray) -> Labelled:
    return Labelled(inputs, labels, np.full(len(labels), inputs.shape[1], np.int32))


def _idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """An idx file of bytes: two zeros, 8, the rank, a size an axis, big-endian, and the bytes."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / name} does not exist, gzipped or not.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}).") from None
    header = 4 * (rank + 1)
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if content[:4] != bytes([0, 0, 8, rank]) or len(content) != header + int(np.prod(shape)):
        raise ValueError(f"{path} is no idx file of rank {rank}.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
