"""The files of a folder in the Hugging Face format: JSON objects and safetensors."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..train.files import read_json
from .architecture import Architecture
from .words import FILES, Words

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
#: What is carried over beside a config, as it is.
BESIDE = (
    GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """All safetensors of a folder, opened and not read."""

    def __init__(self, folder: Path, kind: Architecture):
        self.folder, self.broken = folder, set[str]()
        library = safetensors()
        files = [folder / WEIGHTS]
        if not files[0].exists():
            if not (folder / INDEX).exists():
                pickled = "".join(f", but {p.name}" for p in sorted(folder.glob("*.bin")))
                remedy = "weights that are pickled are not read: convert them to safetensors"
                raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{pickled}; {remedy}.")
            names = sorted(set(words_of(folder / INDEX)("weight_map", FILES).values()))
            files = [folder / name for name in names]
            if missing := [file.name for file in files if not file.exists()]:
                raise FileNotFoundError(f"{folder} misses {', '.join(missing)}: the download is not whole.")
        self._where: dict[str, tuple[Any, str]] = {}  # by our choice of their names: the file, the name in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._faults: list[str] = []
        for file in files:
            try:
                opened = library.safe_open(file, framework="numpy")
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    self._add(kind.aliases.get(name, name), name, opened)
            except library.SafetensorError as error:
                raise ValueError(f"{file} is damaged, or its download is not whole ({error}).") from error

    def _add(self, ours: str, name: str, opened) -> None:
        if ours in self._where:
            other = self._where[ours][1]
            self._faults.append(f"{name} is there twice" if name == other else f"{name} is {other} by another name")
            return
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in FLOATS:
            self._faults.append(f"{name} is {tensor.get_dtype()} and should be one of {', '.join(FLOATS)}")
        self._where[ours] = (opened, name)
        self.shapes[ours] = tuple(tensor.get_shape())

    def part(self, name: str):
        """What slices of the array are read from."""
        opened, theirs = self._where[name]
        return opened.get_slice(theirs)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The whole of an array that is no parameter of ours; zeros where it is not as it should be, which is kept
        for `check` to say."""
        given = self.shapes.pop(name, None)
        if given != shape:
            self._faults.append(f"{name} is missing" if given is None else f"{name} is {given} and should be {shape}")
        if self._faults:
            return np.zeros(shape)
        array = np.asarray(self.part(name)[:], np.float32)
        if not np.isfinite(array).all():
            self.broken.add(name)
        return np.nan_to_num(array)

    def drop_copy(self, name: str, of: str) -> None:
        """Forget a head that is the table, which the original releases write beside it."""
        if name in self.shapes:
            whole = of in self.shapes and not self._faults
            if whole and not np.array_equal(self.part(name)[:], self.part(of)[:], equal_nan=True):
                self._faults.append(f"{name} is not {of}, and the embeddings are tied")
            del self.shapes[name]

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise with all that is missing, unknown, there twice, of another shape, or no floats."""
        given = self.shapes
        faults = [f"{name} is missing" for name in wanted if name not in given]
        faults += [f"{name} is unknown" for name in given if name not in wanted]
        faults += [
            f"{name} is {given[name]} and should be {shape}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ]
        if faults := faults + self._faults:
            raise ValueError(f"{self.folder} holds other weights than its config says: {'; '.join(faults)}.")


def local(folder: str | Path) -> Path:
    """A folder here, or the hub's copy of a name."""
    path = Path(folder)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise FileNotFoundError(f"{folder} is no folder, and no owner/name of the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{folder} is no folder here, and without huggingface_hub none is fetched.") from None
    try:
        return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", *BESIDE]))
    except Exception as error:  # of the network, of the hub, of a name that it does not know
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{folder} is no folder here, and the hub does not give it ({reason}).") from error


def words_of(path: Path) -> Words:
    """The object in a JSON file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    return Words(read_json(path, remedy=""), str(path))


def safetensors(name: str = "safetensors"):
    """The library, or a module of it."""
    try:
        import_module("safetensors.numpy")
    except ImportError:
        raise ImportError("safetensors is not installed: pip install jaxseq[huggingface].") from None
    return import_module(name)
