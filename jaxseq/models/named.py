"""A language model from a command line's words: the only place where mixers have names."""

import inspect
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, get_args

import jax.numpy as jnp

from .. import mixers
from ..fields import check_counts
from ..layers.mixer import Mixer
from .block import Slot
from .language import LanguageModel


@dataclass(frozen=True)
class ModelConfig:
    """The model."""

    mixers: str = "gla"
    """Mixers by name, in the order of the layers, repeated to `depth`: gla, or a list such as mamba,attention."""
    width: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Number of layers, one of each mixer at least."""
    heads: int = 2
    """Heads of the mixers that have them."""
    conv_window: int | None = 4
    """Window of the convolution in front of the mixers that have one; none where a mixer can do without."""
    ngrams: tuple[int, ...] = ()
    """Sizes of the n-grams whose hashed embeddings are added to the tokens' own."""
    ngram_buckets: int = 2**15
    """Rows of the table that all n-grams share."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, states and sums stay in float32."""

    def __post_init__(self):
        if min(self.ngrams, default=2) < 2:
            raise ValueError(f"model.ngrams={self.ngrams} must be sizes of 2 or more.")
        if self.conv_window is not None and self.conv_window < 1:
            raise ValueError(f"model.conv_window={self.conv_window} must be at least 1, or none.")
        check_counts(self, "width", "depth", "heads", "ngram_buckets", section="model.")
        self.slots()

    def slots(self, *, max_length: int | None = None) -> tuple[Slot, ...]:
        """One slot a layer. The names are those of the classes in `jaxseq.mixers`, in lower case.

        Mixers whose parameters are of a longest sequence are made for `max_length` tokens, of their own number if None.

        All layers of a name are one slot, so that depth is a scan; but what starts by its place in the authors' models
        (`layer` of RWKV and Lightning) has a slot for each. The bounds of HGRN's decays, which its authors
        learn across layers, are those of its first layer throughout.
        """
        known = _known()
        names = [name.strip().lower() for name in self.mixers.split(",")]
        for name in names:
            if name not in known:
                raise ValueError(f"model.mixers={self.mixers}: no mixer is called {name!r}; choose {', '.join(known)}.")
        options = {"num_heads": self.heads, "conv_window": self.conv_window}
        options |= {} if max_length is None else {"max_length": max_length}
        slots: dict[str, Any] = {name: _with_options(known[name], options) for name in names}
        depth = max(self.depth, len(names))

        def slot(layer: int) -> Slot:
            name = names[layer % len(names)]
            if "layer" not in slot_fields(name):
                return slots[name]
            return partial(slots[name], layer=layer, num_layers=depth)

        return tuple(slot(layer) for layer in range(depth))


#: Tokens of mixers that have a longest sequence, as they come.
OWN_LENGTH = 1024


def named_language_model(
    config: ModelConfig, vocab_size: int, max_length: int | None = None, **fields
) -> LanguageModel:
    """The language model of a config; `fields` go to `LanguageModel`.

    Mixers whose parameters, or caches, are of a longest sequence are made for `max_length` tokens, and for as many as
    they are by themselves at least, so that short contexts leave room to decode.
    """
    longest = max_length and max(max_length, OWN_LENGTH)
    options: dict[str, Any] = {
        "mixers": config.slots(max_length=longest),
        "ngrams": config.ngrams,
        "ngram_buckets": config.ngram_buckets,
        "dtype": jnp.bfloat16 if config.bfloat16 else None,
    }
    return LanguageModel(vocab_size, config.width, **options | fields)


def mixer_names() -> list[str]:
    """The names that `ModelConfig.mixers` takes."""
    return sorted(_known())


def slot_fields(name: str) -> set[str]:
    """The options of the mixer of a name."""
    return set(inspect.signature(_known()[name]).parameters)


def _known() -> dict[str, Any]:
    """Those that have a state, and what is made of them."""
    kinds = {name: (kind.func if isinstance(kind, partial) else kind, kind) for name, kind in vars(mixers).items()}
    stateful = lambda of: isinstance(of, type) and issubclass(of, Mixer) and of.init_state is not Mixer.init_state
    return {name.lower(): kind for name, (of, kind) in kinds.items() if stateful(of)}


def _with_options(kind, options) -> Slot:
    """The mixer with those options that it has a field for; None where the field allows it."""
    fields = inspect.signature(kind).parameters
    taken = {name: value for name, value in options.items() if name in fields}
    optional = {name for name in taken if NoneType in get_args(fields[name].annotation)}
    return partial(kind, **{name: value for name, value in taken.items() if value is not None or name in optional})
