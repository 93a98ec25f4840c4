"""What an architecture of another library is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ..models import LanguageModel
from .words import COUNT, FLAG, POSITIVE, Words

Config = dict[str, Any]
#: (name, shape) → one of their weights that is a field of our mixers, no parameter.
Take = Callable[[str, tuple[int, ...]], np.ndarray]


class Architecture(NamedTuple):
    """One `model_type`. Names are theirs, paths ours; those of layers are within a layer and within a block."""

    read: Callable[[Words, Take], LanguageModel]
    write: Callable[[LanguageModel, Any], Config]  # of a model and the mixer in its slots
    mixer: type
    layer: str  # what the names of layer i begin with
    names: dict[str, str]
    outer: dict[str, str]
    aliases: dict[str, str] = {}  # other names in use


def language_model(words: Words, mixer: Callable[..., nn.Module], norm: str, mlp: Any, *, tied: bool) -> LanguageModel:
    """The model of a config; `norm` is its word for the ε of norms, `tied` holds where it does not say."""
    return LanguageModel(
        words("vocab_size", COUNT),
        words("hidden_size", COUNT),
        (mixer,) * words("num_hidden_layers", COUNT),
        mlp=mlp,
        tied=words("tie_word_embeddings", FLAG, tied),
        norm_eps=words(norm, POSITIVE),
    )
