"""Folders in the Hugging Face format, a config and safetensors, as language models of ours, and back."""

import json
import re
import shutil
from collections import Counter
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
from .architecture import Architecture
from .architectures import architecture, of_model
from .files import BESIDE, GENERATION, WEIGHTS, Tensors, local, safetensors, words_of
from .words import TOKENS, Words, optional

CONFIG = "config.json"
#: Words of a config that tell of the weights beside it, or are told by every model.
OWN = {"model_type", "architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path"}
#: Fields that say how to compute, not what.
COMPUTE = ("dtype", "param_dtype", "impl", "chunk_size", "name", "parent")
#: Fields that say how parameters start, which the formats have no word for: those that are saved have started.
START = ("num_layers",)


def load_huggingface(folder: str | Path, *, dtype: Any = None, mesh: Mesh | None = None) -> tuple[LanguageModel, dict]:
    """The language model and the parameters of a folder, or of the hub's copy of a name where the hub is at hand.

    The architectures are those of `interop.architectures`; parameters are float32, `dtype` is what layers compute in.
    With a `mesh` every device reads its own part (`train.sharding.shardings`). Pickled weights are not read.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      NotImplementedError: the architecture is unknown; the message lists those that are known.
      ValueError: a file is damaged; the config has a value of the wrong kind, or asks for what our mixers do not do;
        or weights are missing, unknown, there twice, of another shape or no floats: all of them in one message. Those
        that are not finite show as they are read, all in one message too.
    """
    folder = local(folder)
    kind, words = architecture(words_of(folder / CONFIG))
    tensors = Tensors(folder, kind)
    model = kind.read(words, tensors.take).clone(dtype=dtype)
    shapes = _shapes(model)
    names = _names(kind, model, shapes)
    if model.tied:
        tensors.drop_copy("lm_head.weight", names["Embed_0/embedding"][0])
    tensors.check(_wanted(names, shapes))
    flat = traverse_util.unflatten_dict(shapes, sep="/")
    where = shardings(flat, mesh) if mesh else jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), flat)
    placed = traverse_util.flatten_dict(where, sep="/")
    params = {
        path: jax.make_array_from_callback(x.shape, placed[path], _reader(tensors, path, names[path], x))
        for path, x in shapes.items()
    }
    if tensors.broken:
        raise ValueError(f"{folder} holds weights that are not finite: {', '.join(sorted(tensors.broken))}.")
    return model, {"params": traverse_util.unflatten_dict(params, sep="/")}


def save_huggingface(model: LanguageModel, params: dict, folder: str | Path, *, like: str | Path | None = None) -> None:
    """Write what `load_huggingface`, and the library whose format it is, read: a config and one safetensors file.

    `like` is a folder, as the one that the model was loaded from, whose tokenizer, generation_config.json and words of
    the config that are not the architecture's go along: the numbers of special tokens, and where it is the same
    architecture all others. Each file is whole or absent; the config comes last.

    Raises:
      FileNotFoundError: `like` is no folder.
      NotImplementedError: no architecture has these mixers.
      ValueError: the format has no word for a field of the model, or the parameters are not the model's.
    """
    save_file = safetensors("safetensors.numpy").save_file
    kind, config = of_model(model)
    beside = None if like is None else _folder(like)
    config |= {} if beside is None else _carried(beside, kind, config["model_type"])
    _check_same(kind.read(Words(config), _nothing), model)
    shapes = _shapes(model)
    arrays = traverse_util.flatten_dict(params["params"], sep="/")
    if {k: x.shape for k, x in arrays.items()} != {k: x.shape for k, x in shapes.items()}:
        odd = sorted(set(arrays) ^ set(shapes)) or [k for k in shapes if arrays[k].shape != shapes[k].shape]
        raise ValueError(f"params are not those of the model: {', '.join(odd)}.")
    tensors = {}
    for path, names in _names(kind, model, shapes).items():
        array = np.asarray(arrays[path])
        for name, ours in zip(names, array if _is_stacked(path) else array[None], strict=True):
            tensors[name] = np.ascontiguousarray(_transposed(name, ours))
    # Of mixed ones what most are of, as the float32 head of a bfloat16 model.
    config["dtype"] = str(Counter(str(tensor.dtype) for tensor in tensors.values()).most_common(1)[0][0])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [] if beside is None else _beside(beside):
        with atomically(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    with atomically(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def tokenizer_text(folder: str | Path) -> Text:
    """The tokenizer of a folder, its tokenizer.json, and the tokens that end a text.

    These are the `eos_token_id` of generation_config.json, one or a list; of config.json where that names none.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a file is damaged, or a token is no number.
    """
    folder = local(folder)
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
    tokenizer.no_truncation()  # a file may ask for both, for training: here a prompt is a prompt
    tokenizer.no_padding()
    says = [words_of(folder / name) for name in (GENERATION, CONFIG) if name == CONFIG or (folder / name).exists()]
    stops = [words("eos_token_id", optional(TOKENS), None) for words in says]
    encode = lambda text: np.asarray(tokenizer.encode(text).ids, np.int32)
    return Text(encode, tokenizer.decode, next(filter(None, stops), ()))


# ---- what goes along ----------------------------------------------------------------------------------------------


def _beside(like: Path) -> list[Path]:
    """A tokenizer's files, and how to generate."""
    return sorted({file for name in BESIDE for file in like.glob(name) if file.is_file()})


def _carried(like: Path, kind: Architecture, model_type: str) -> dict[str, Any]:
    """The words of another folder's config that describe neither its architecture nor its weights."""
    if not (like / CONFIG).exists():
        return {}
    words = words_of(like / CONFIG)
    kept = {name for name in words.values if name.endswith("_token_id")}
    if words.values.get("model_type") == model_type:
        kind.read(words, _nothing)  # what it looks at describes the architecture
        kept = words.values.keys() - words.asked - OWN
    return {name: words.values[name] for name in kept}


def _nothing(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"like={path} is no folder.")
    return Path(path)


# ---- names and layouts ----------------------------------------------------------------------------------------------


def _shapes(model: LanguageModel) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return traverse_util.flatten_dict(shapes["params"], sep="/")


def _names(kind: Architecture, model: LanguageModel, shapes: dict[str, Any]) -> dict[str, list[str]]:
    """Their names of every parameter of ours, one for each layer that is stacked in it."""
    outer, inner = ({ours: name for name, ours in names.items()} for names in (kind.outer, kind.names))
    blocks = {path: re.fullmatch(r"stack/layers/block_(\d+)/(.+)", path) for path in shapes}
    period = len({block[1] for block in blocks.values() if block})
    names = {}
    for path, block in blocks.items():
        name = inner.get(block[2]) if block else outer.get(path)
        if name is None:
            raise ValueError(f"{path} has no name in this format.")
        layers = range(int(block[1]), len(model.mixers), period) if block else None
        names[path] = [name] if layers is None else [kind.layer.format(i) + name for i in layers]
    return names


def _is_stacked(path: str) -> bool:
    return path.startswith("stack/layers")


def _is_table(name: str) -> bool:
    return name.endswith("embeddings.weight")


def _wanted(names: dict[str, list[str]], shapes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each of their weights."""
    of = lambda path: shapes[path].shape[1:] if _is_stacked(path) else shapes[path].shape
    shape = lambda name, path: _transposed(name, np.broadcast_to(0, of(path))).shape
    return {name: shape(name, path) for path, theirs in names.items() for name in theirs}


def _transposed(name: str, ours: np.ndarray) -> np.ndarray:
    """[in, out] → [out, in]; a depthwise filter [W, D] → [D, 1, W]; a table and what is no weight as it is."""
    if "conv1d.weight" in name:
        return ours.T[:, None]
    return ours.T if name.endswith("weight") and ours.ndim == 2 and not _is_table(name) else ours


def _reader(tensors: Tensors, path: str, names: list[str], like) -> Callable:
    """index → the part of a parameter of ours: of a stack of layers, or of one array."""

    def part(name: str, index) -> np.ndarray:
        slices = tensors.part(name)
        if "conv1d.weight" in name:
            array = np.asarray(slices[index[1], :, index[0]])[:, 0].T
        elif name.endswith("weight") and len(index) == 2 and not _is_table(name):
            array = np.asarray(slices[index[1], index[0]]).T
        else:
            array = np.asarray(slices[index])
        array = array.astype(like.dtype)
        if not np.isfinite(array).all():
            tensors.broken.add(name)
        return array

    def read(index) -> np.ndarray:
        if not _is_stacked(path):
            return part(names[0], index)
        return np.stack([part(name, index[1:]) for name in names[index[0]]])

    return read


def _check_same(read: LanguageModel, model: LanguageModel) -> None:
    """Raise where the format would forget something that the model computes."""

    def fields(module) -> dict[str, Any]:
        names = (name for name in module.__dataclass_fields__ if name not in COMPUTE + START)
        return {name: getattr(module, name) for name in names}

    ours, theirs = ({k: v for k, v in fields(m).items() if not k.startswith("remat")} for m in (model, read))
    slots = [(m.pop("mixers"), m.pop("mlp")) for m in (ours, theirs)]
    ours |= {"ngram_buckets": theirs["ngram_buckets"]} if not model.ngrams else {}
    built = [
        [slot and fields(slot(d_model=model.d_model, parent=None)) for slot in (*layers, mlp)] for layers, mlp in slots
    ]
    pairs = [(ours, theirs), *zip(*built, strict=True)]
    if any(a is not None and b is None for a, b in pairs):
        raise ValueError(f"This format has no word for mlp={model.mlp!r}: its layers have none; give mlp=None.")
    lost = lambda a, b: [k for k in a if a[k] is not None and a[k] != b[k]]  # None: the config has it
    odd = {f"{k}={a[k]!r} (it would be {b[k]!r})" for a, b in pairs if a is not None for k in lost(a, b)}
    if odd:
        raise ValueError(f"This format has no word for {', '.join(sorted(odd))}.")
