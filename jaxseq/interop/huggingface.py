"""Folders in the Hugging Face format, a config and safetensors, as language models of ours, and back."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from ..decode import Text
from ..models import LanguageModel
from ..train.files import atomically, write_text
from ..train.sharding import shardings
from .architectures import Architecture, architecture, of_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Fields that say how to compute, not what.
COMPUTE = ("dtype", "param_dtype", "impl", "chunk_size", "name", "parent")


def load_huggingface(folder: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> tuple[LanguageModel, dict]:
    """The language model and the parameters of a folder, or of the hub's copy of a name where the hub is at hand.

    The architectures are those of `interop.architectures`; parameters are float32, `dtype` is what layers compute in.
    With a `mesh` every device reads its own part (`train.sharding.shardings`). Pickled weights are not read.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      NotImplementedError: the architecture is unknown; the message lists those that are known.
      ValueError: a file is damaged, the config asks for what our mixers do not do, or weights are missing, unknown or
        of another shape: all of them in one message.
    """
    folder = _local(folder)
    config = _json(folder / "config.json")
    try:
        kind, config = architecture(config)
        model = kind.read(config).clone(dtype=dtype)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} misses {error}.") from error
    tensors = _Tensors(folder, kind)
    shapes = _shapes(model)
    names = {path: _theirs(kind, model, path) for path in shapes}
    if model.tied:
        tensors.drop_copy("lm_head.weight", names["Embed_0/embedding"][0])
    _check(tensors, names, shapes)
    flat = traverse_util.unflatten_dict(shapes, sep="/")
    where = shardings(flat, mesh) if mesh else jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), flat)
    placed = traverse_util.flatten_dict(where, sep="/")
    params = {
        path: jax.make_array_from_callback(x.shape, placed[path], _reader(tensors, names[path], x))
        for path, x in shapes.items()
    }
    return model, {"params": traverse_util.unflatten_dict(params, sep="/")}


def save_huggingface(model: LanguageModel, params: dict, folder: str | Path) -> None:
    """Write what `load_huggingface`, and the library whose format it is, read: a config and one safetensors file.

    Each file is whole or absent; the config comes last.

    Raises:
      NotImplementedError: no architecture has these mixers.
      ValueError: the format has no word for a field of the model, or the parameters are not the model's.
    """
    save_file = _safetensors("numpy").save_file
    kind, config = of_model(model)
    _check_same(kind.read(architecture(config)[1]), model)
    shapes = _shapes(model)
    arrays = traverse_util.flatten_dict(params["params"], sep="/")
    if {k: x.shape for k, x in arrays.items()} != {k: x.shape for k, x in shapes.items()}:
        odd = sorted(set(arrays) ^ set(shapes)) or [k for k in shapes if arrays[k].shape != shapes[k].shape]
        raise ValueError(f"params are not those of the model: {', '.join(odd)}.")
    tensors = {}
    for path, array in arrays.items():
        names = _theirs(kind, model, path)
        each = np.asarray(array) if len(names) > 1 or path.startswith("stack/layers") else np.asarray(array)[None]
        for name, ours in zip(names, each, strict=True):
            tensors[name] = np.ascontiguousarray(_transposed(name, ours))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def tokenizer_text(folder: str | Path) -> Text:
    """The tokenizer of a folder, its tokenizer.json, and the token that ends a text.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged.
    """
    folder = _local(folder)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: without it there is no way from text to tokens.")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("tokenizers is not installed: pip install jaxseq[huggingface].") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is damaged ({error}).") from error
    stop = _json(folder / "config.json").get("eos_token_id")
    encode = lambda text: np.asarray(tokenizer.encode(text).ids, np.int32)
    return Text(encode, tokenizer.decode, stop[0] if isinstance(stop, list) else stop)


# ---- names and layouts ----------------------------------------------------------------------------------------------


def _shapes(model: LanguageModel) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return traverse_util.flatten_dict(shapes["params"], sep="/")


def _theirs(kind: Architecture, model: LanguageModel, path: str) -> list[str]:
    """Their names of a parameter of ours, one for each layer that is stacked in it."""
    for name, ours in kind.outer.items():
        if ours == path:
            return [name]
    inside = path.removeprefix("stack/layers/block_0/")
    found = [name for name, ours in kind.names.items() if ours == inside]
    if inside == path or not found:
        raise ValueError(f"{path} has no name in this format.")
    return [kind.layer.format(i) + found[0] for i in range(len(model.mixers))]


def _is_table(name: str) -> bool:
    return name.endswith("embeddings.weight")


def _transposed(name: str, ours: np.ndarray) -> np.ndarray:
    """[in, out] → [out, in]; a depthwise filter [W, D] → [D, 1, W]; a table and what is no weight as it is."""
    if "conv1d.weight" in name:
        return ours.T[:, None]
    return ours.T if name.endswith("weight") and ours.ndim == 2 and not _is_table(name) else ours


def _reader(tensors: "_Tensors", names: list[str], like) -> Callable:
    """index → the part of a parameter of ours: of a stack of layers, or of one array."""

    def part(name: str, index) -> np.ndarray:
        slices = tensors.part(name)
        if "conv1d.weight" in name:
            return np.asarray(slices[index[1], :, index[0]])[:, 0].T
        if name.endswith("weight") and len(index) == 2 and not _is_table(name):
            return np.asarray(slices[index[1], index[0]]).T
        return np.asarray(slices[index])

    def read(index) -> np.ndarray:
        if names[0] in tensors.single:
            return part(names[0], index).astype(like.dtype)
        return np.stack([part(name, index[1:]) for name in names[index[0]]]).astype(like.dtype)

    return read


def _check(tensors: "_Tensors", names: dict[str, list[str]], shapes: dict[str, Any]) -> None:
    """Raise with all that is missing, unknown or of another shape."""
    tensors.single = {theirs[0] for path, theirs in names.items() if not path.startswith("stack/layers")}
    wanted: dict[str, tuple[int, ...]] = {}
    for path, theirs in names.items():
        shape = shapes[path].shape if theirs[0] in tensors.single else shapes[path].shape[1:]
        wanted |= {name: _transposed(name, np.broadcast_to(0, shape)).shape for name in theirs}
    given = tensors.shapes
    faults = [f"{name} is missing" for name in wanted if name not in given]
    faults += [f"{name} is unknown" for name in given if name not in wanted]
    faults += [
        f"{name} is {given[name]} and should be {shape}"
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if faults:
        raise ValueError(f"{tensors.folder} holds other weights than its config says: {'; '.join(faults)}.")


def _check_same(read: LanguageModel, model: LanguageModel) -> None:
    """Raise where the format would forget something that the model computes."""

    def fields(module) -> dict[str, Any]:
        names = (name for name in module.__dataclass_fields__ if name not in COMPUTE)
        return {name: getattr(module, name) for name in names}

    ours, theirs = ({k: v for k, v in fields(m).items() if not k.startswith("remat")} for m in (model, read))
    slots = [(m.pop("mixers"), m.pop("mlp")) for m in (ours, theirs)]
    ours |= {"ngram_buckets": theirs["ngram_buckets"]} if not model.ngrams else {}
    built = [
        [slot and fields(slot(d_model=model.d_model, parent=None)) for slot in (*layers, mlp)] for layers, mlp in slots
    ]
    pairs = [(ours, theirs), *zip(*built, strict=True)]
    lost = lambda a, b: [k for k in a if a[k] is not None and (b is None or a[k] != b[k])]  # None: the config has it
    odd = {f"{k}={a[k]!r}" for a, b in pairs if a is not None for k in lost(a, b)}
    if odd:
        raise ValueError(f"This format has no word for {', '.join(sorted(odd))}.")


# ---- files ----------------------------------------------------------------------------------------------------------


class _Tensors:
    """All safetensors of a folder, opened and not read."""

    single: set[str]  # names of what is no layer's

    def __init__(self, folder: Path, kind: Architecture):
        self.folder = folder
        library = _safetensors()
        files = [folder / WEIGHTS]
        if not files[0].exists():
            if not (folder / INDEX).exists():
                pickled = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
                also = f"; {pickled} is pickled, which is not read: convert it to safetensors" if pickled else ""
                raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{also}.")
            names = sorted(set(_json(folder / INDEX)["weight_map"].values()))
            files = [folder / name for name in names]
            if missing := [file.name for file in files if not file.exists()]:
                raise FileNotFoundError(f"{folder} misses {', '.join(missing)}: the download is not whole.")
        self._where, self.shapes = {}, {}
        for file in files:
            try:
                opened = library.safe_open(file, framework="numpy")
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    ours = kind.aliases.get(name, name)
                    self._where[ours] = (opened, name)
                    self.shapes[ours] = tuple(opened.get_slice(name).get_shape())
            except library.SafetensorError as error:
                raise ValueError(f"{file} is damaged, or its download is not whole ({error}).") from error

    def part(self, name: str):
        """What slices of the array are read from."""
        opened, theirs = self._where[name]
        return opened.get_slice(theirs)

    def drop_copy(self, name: str, of: str) -> None:
        """Forget a head that is the table, which the original releases write beside it."""
        if name in self.shapes:
            if of in self.shapes and not np.array_equal(self.part(name)[:], self.part(of)[:]):
                raise ValueError(f"{self.folder} has tied embeddings, and {name} is not {of}.")
            del self.shapes[name]


def _local(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise FileNotFoundError(f"{folder} is no folder, and no owner/name of the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{folder} is no folder here, and without huggingface_hub none is fetched.") from None
    return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return value


def _safetensors(module: str = ""):
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError("safetensors is not installed: pip install jaxseq[huggingface].") from None
    return getattr(safetensors, module) if module else safetensors
