"""Where text comes from: documents of bytes, split into train, validation and test the same way on every run."""

import bz2
import gzip
import hashlib
import itertools
import lzma
import os
import re
import sysconfig
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from . import _tfds

_DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # what the three raise on bad input
_BINARY = (b"PK\x03\x04", b"%PDF", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # zip, pdf, gz, bz2, xz: may lack a NUL byte
_SPLITS = {"train": {"train"}, "validation": {"valid", "validation", "val", "dev"}, "test": {"test"}}
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


class Document(NamedTuple):
    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Three disjoint splits, each an ordered tuple of non-empty documents.

    `rule` says in words how they were split; `skipped` counts what a folder held besides text: binary files,
    devices, links to other folders, and files that no split is of where names tell of splits.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    rule: str
    skipped: int = 0

    def __post_init__(self):
        for split in ("train", "validation", "test"):
            if not getattr(self, split):
                raise ValueError(
                    f"the text is too short: nothing is left for {split}, split {self.rule}; use more text."
                )

    @classmethod
    def standard_library(cls) -> "Corpus":
        """The sources of the running Python's standard library, without its tests and installed packages."""
        folder = Path(sysconfig.get_path("stdlib"))
        return cls._of_files(folder, [name for name in _walk(folder, _NOT_LIBRARY) if name.endswith(".py")])

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> "Corpus":
        """A text file, or every text file under a folder, hidden ones left out.

        .gz, .bz2 and .xz are decompressed, and a .zip is a folder. Twenty files or more are split by file, fewer by
        position in each file: train, validation, test are 90, 5, 5 %. Where the names of most files, or of the folders
        they are in, tell of two splits or three, as wiki.train.tokens and wiki.test.tokens do, the splits are those;
        one that is not named is cut from those to train on, which are those to validate on where there are no others,
        and files of other names are skipped.

        Raises:
          FileNotFoundError: nothing is there.
          OSError: a file, or a folder in the folder, cannot be read.
          ValueError: a compressed file is damaged; a file named directly is binary; there is no text, or too little.
        """
        path = Path(path).expanduser()
        if path.is_dir():
            return cls._of_files(path, list(_walk(path)))
        if path.suffix.lower() == ".zip" and path.is_file():
            return cls._of_files(path.parent, [path.name])
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name a text file or a folder of text files.")
        content = _read(path)
        if content is None:
            raise ValueError(f"{path} is binary; name a UTF-8 text file (convert UTF-16 first, unpack archives).")
        if not content:
            raise ValueError(f"{path} is empty; name a file that holds text.")
        return cls._split([Document(path.name, content)])

    @classmethod
    def from_tfds(cls, name: str, data_dir: str | os.PathLike[str] | None = None) -> "Corpus":
        """The first `Text` feature of a TensorFlow Datasets set (`name`, `name/config`), read whole into memory.

        The set is looked for in `data_dir` (None: ~/tensorflow_datasets), else downloaded to it as array_record, so
        that TensorFlow is not needed. Its train, validation and test are used; what is missing is cut from train.

        Raises:
          ConnectionError: the set is neither on disk nor within reach.
          ValueError: no such set; no text or no train split in it; stored in another format than array_record.
          RuntimeError: preparing it failed.
        """
        splits = {
            split: tuple(Document(f"{split}/{i:09}", text) for i, text in enumerate(texts) if text)
            for split, texts in _tfds.texts(name, data_dir).items()
        }
        rule = "as the set comes"
        if missing := [split for split in ("validation", "test") if split not in splits]:
            parts, shares = _cut(splits["train"], len(missing))
            splits |= dict(zip(["train", *missing], parts, strict=True))
            rule = f"{' and '.join(missing)} cut from train {shares}"
        return cls(splits["train"], splits["validation"], splits["test"], rule)

    @classmethod
    def _of_files(cls, folder: Path, names: Sequence[str]) -> "Corpus":
        contents: dict[str, bytes | None] = {}
        for name in sorted(names):
            contents |= _members(folder, name) if name.lower().endswith(".zip") else {name: _read(folder / name)}
        documents = [Document(name, content) for name, content in contents.items() if content]
        if not documents:
            raise ValueError(f"{folder} holds no text ({len(names)} files); name a folder with UTF-8 text files in it.")
        return cls._split(documents, skipped=sum(content is None for content in contents.values()))

    @classmethod
    def _split(cls, documents: Sequence[Document], skipped: int = 0) -> "Corpus":
        named = _by_name(documents)
        skipped += len(documents) - sum(map(len, named.values()))
        missing = [split for split in ("validation", "test") if split not in named]
        parts, rule = _cut(named["train"], len(missing))
        splits = named | dict(zip(("train", *missing), parts, strict=True))
        if len(missing) < 2:
            rule = "by the names of files" + "".join(f", {split} cut from train {rule}" for split in missing)
        return cls(splits["train"], splits["validation"], splits["test"], rule, skipped)


def joined(documents: Sequence[Document]) -> bytes:
    """The documents end to end."""
    return b"".join(document.content for document in documents)


def _by_name(documents: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    """Documents by the split that is a word of their names or one of their folders; else all for training.

    Where none is for training, those for validation are.
    """
    found: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        *folders, name = PurePath(document.name.lower()).parts
        words = {*folders, *re.findall("[a-z]+", name)}
        found[next((split for split, names in _SPLITS.items() if words & names), "")].append(document)
    others = found.pop("", [])
    if len(found) < 2 or len(others) >= len(documents) / 2:
        return {"train": tuple(documents)}
    if "train" not in found:
        found["train"] = found.pop("validation")
    return {split: tuple(those) for split, those in found.items()}


def _cut(documents: Sequence[Document], held_out: int) -> tuple[list[tuple[Document, ...]], str]:
    """The train and held-out splits, and the rule in words: 1/20 of the documents each, or of each if they are few."""
    shares = f"{100 - 5 * held_out}{'/5' * held_out}"
    if len(documents) >= 20:
        ranked = sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
        return [tuple(sorted(part)) for part in _parts(ranked, held_out)], f"by document, ranked by sha256, {shares}"
    pieces = [[Document(d.name, part) for part in _parts(d.content, held_out)] for d in documents]
    splits = [tuple(piece for piece in split if piece.content) for split in zip(*pieces, strict=True)]
    return splits, f"by position in each document, {shares}"


def _parts(whole, held_out: int) -> list:
    """A sequence cut into a first part and `held_out` twentieths."""
    cuts = [0, *(len(whole) * (20 - held_out + i) // 20 for i in range(held_out + 1))]
    return [whole[i:j] for i, j in itertools.pairwise(cuts)]


def _walk(folder: Path, without: frozenset[str] = frozenset()) -> Iterator[str]:
    """POSIX paths, relative to the folder, of all that is not hidden; links to folders are named, not entered."""
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in files + links:
            if not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


def _members(folder: Path, name: str) -> dict[str, bytes | None]:
    """What is in an archive, hidden files left out, by the archive's name and theirs."""
    path = folder / name
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [each for each in archive.namelist() if not each.endswith("/")]
            seen = [each for each in inside if not any(part.startswith((".", "__")) for part in each.split("/"))]
            return {f"{name}/{each}": _text(archive.read(each)) for each in seen}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, *_DAMAGED) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); fetch or pack it again.") from None


def _read(path: Path) -> bytes | None:
    """The text, decompressed; None where there is none to read: binary, a device, a folder."""
    try:
        if path.exists() and not path.is_file():
            return None
        content = path.read_bytes()
    except OSError as error:
        _unreadable(error)
    if decompress := _DECOMPRESS.get(path.suffix.lower()):
        try:
            content = decompress(content)
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error}); fetch or compress it again.") from None
    return _text(content)


def _text(content: bytes) -> bytes | None:
    return None if b"\0" in content or content.startswith(_BINARY) else content


def _unreadable(error: OSError):
    raise OSError(
        f"{error.filename} cannot be read ({error.strerror}); check its permissions or move it away."
    ) from None
