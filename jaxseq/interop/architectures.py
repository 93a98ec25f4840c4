"""Language models that other libraries write: which of them a config, or a model of ours, is."""

from typing import Any

from ..models import LanguageModel
from .architecture import Architecture, Config
from .fla_models import FLA
from .mamba import MAMBA, of_release
from .words import TEXT, Words

ARCHITECTURES = MAMBA | FLA


def architecture(words: Words) -> tuple[Architecture, Words]:
    """The architecture of a config, and the config in the words of its family.

    Raises:
      NotImplementedError: the model type is unknown here; the message lists those that are known.
      ValueError: the config of a release has a value of the wrong kind.
    """
    words = words if "model_type" in words.values else of_release(words)
    kind = words("model_type", TEXT)
    if kind not in ARCHITECTURES:
        raise NotImplementedError(f"model_type={kind!r} has no model here; choose one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind], words


def of_model(model: LanguageModel) -> tuple[Architecture, Config]:
    """The architecture of a model, and its config.

    Raises:
      NotImplementedError: no architecture has these mixers.
      ValueError: the layers differ in a field, which the formats hold once for all.
    """
    modules: list[Any] = [slot and slot(d_model=model.d_model, parent=None) for slot in model.mixers]
    kinds = {type(module) for module in modules}
    for name, kind in ARCHITECTURES.items():
        if kinds == {kind.mixer}:
            first, *rest = modules
            odd = {
                field for m in rest for field in m.__dataclass_fields__ if getattr(m, field) != getattr(first, field)
            }
            if odd:
                raise ValueError(f"mixers differ in {', '.join(sorted(odd))}; this format takes one for all layers.")
            config = {
                "model_type": name,
                "vocab_size": model.vocab_size,
                "hidden_size": model.d_model,
                "num_hidden_layers": len(modules),
                "tie_word_embeddings": model.tied,
                "dtype": "float32",
            }
            return kind, config | kind.write(model, first)
    given = ", ".join(sorted(kind.__name__ for kind in kinds))
    known = ", ".join(kind.mixer.__name__ for kind in ARCHITECTURES.values())
    raise NotImplementedError(f"mixers of {given} have no format here; give layers of one of {known}.")
