"""Forecasters from a command line's words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn

from ..fields import check_counts
from ..layers import Bidirectional, GatedMLP
from ..layers.mlp import MLP
from ..layers.self_attention import SelfAttention
from ..mixers import LSTM, S4D, Attention, Mamba
from .chimera import SEASON, TREND, ChimeraForecaster, ChimeraGrid
from .forecasters import LinearForecaster, PatchForecaster, SequenceForecaster
from .itransformer import ITransformer
from .named import ModelConfig, mixer_names


@dataclass(frozen=True)
class ForecasterConfig:
    """Sizes, the same for all forecasters."""

    width: int = 128
    """Width of the models that have one."""
    depth: int = 2
    """Their layers."""
    heads: int = 8
    """Their heads, where they attend."""
    cell_width: int = 4
    """Channels of a cell, a number of one variate, in Chimera."""
    states: int = 4
    """Chimera's states a channel."""
    inverted: str = ""
    """What mixes the variates of the inverted transformer: a mixer by name, in both directions; attention where none
    is given."""
    dropout: float = 0.0
    """Share of channels and weights dropped in training; Chimera and the linear maps drop none."""
    remat: bool = False
    """Whether Chimera's blocks are computed again in the backward pass, in less memory."""

    def __post_init__(self):
        check_counts(self, "width", "depth", "heads", "cell_width", "states", section="model.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be 0 or more and below 1.")
        if self.inverted not in ("", *mixer_names()):
            raise ValueError(f"model.inverted={self.inverted!r} is no mixer; choose {', '.join(mixer_names())}.")


def named_forecaster(config: ForecasterConfig, name: str, horizon: int, variates: int | None = None) -> nn.Module:
    """The model of a name, `B L V -> B S V` of S = `horizon` steps; of one variate Chimera has one direction.

    Raises:
      ValueError: no forecaster is called so.
    """
    if name not in _FORECASTERS:
        raise ValueError(f"no forecaster is called {name!r}; choose {', '.join(_FORECASTERS)}.")
    alone = name.startswith("chimera") and variates == 1
    return _FORECASTERS[name](config, horizon, **({"bidirectional": False} if alone else {}))


def forecaster_names() -> list[str]:
    """The names that `named_forecaster` takes."""
    return list(_FORECASTERS)


def _attention(c: ForecasterConfig) -> Any:
    return partial(SelfAttention, num_heads=c.heads, dropout=c.dropout)


def _variate_mixer(c: ForecasterConfig) -> Any:
    if not c.inverted:
        return _attention(c)
    named = ModelConfig(mixers=c.inverted, heads=c.heads, depth=1, conv_window=None)
    mixer: Any = named.slots()[0]
    return partial(Bidirectional, mixer=mixer)


def _stack(slot: Any, c: ForecasterConfig) -> dict[str, Any]:
    return dict(d_model=c.width, mixers=(slot,) * c.depth, dropout=c.dropout)


def _mlp(c: ForecasterConfig) -> Any:
    return partial(MLP, hidden=c.width, dropout=c.dropout)


def _chimera(c: ForecasterConfig, horizon: int, season: bool = True, gated: bool = True, **options) -> nn.Module:
    """As published, or with one part left out."""
    trend, fast = (partial(head, state_size=c.states, **options) for head in (TREND, SEASON))
    fields: dict[str, Any] = dict(trend=trend, season=fast if season else None, gated=gated, remat=c.remat)
    return ChimeraForecaster(horizon, partial(ChimeraGrid, c.cell_width, c.depth, **fields))


_FORECASTERS: dict[str, Callable[..., nn.Module]] = {
    "dlinear": lambda c, horizon: LinearForecaster(horizon),
    "rlinear": lambda c, horizon: LinearForecaster(horizon, window=None, normalise=True),
    "patches": lambda c, horizon: PatchForecaster(horizon, **_stack(_attention(c), c), mlp=_mlp(c)),
    "transformer": lambda c, horizon: SequenceForecaster(
        horizon, **_stack(partial(Attention, num_heads=c.heads), c), mlp=GatedMLP
    ),
    "lstm": lambda c, horizon: SequenceForecaster(horizon, **_stack(LSTM, c)),
    "s4d": lambda c, horizon: SequenceForecaster(horizon, **_stack(partial(S4D, state_size=64), c), mlp=GatedMLP),
    "mamba": lambda c, horizon: SequenceForecaster(horizon, **_stack(partial(Mamba, num_layers=c.depth), c)),
    "itransformer": lambda c, horizon: ITransformer(horizon, **_stack(_variate_mixer(c), c), mlp=_mlp(c)),
    "chimera": _chimera,
    "chimera-one-way": partial(_chimera, bidirectional=False),
    "chimera-static": partial(_chimera, input_dependent=False),
    "chimera-ungated": partial(_chimera, gated=False),
    "chimera-trend": partial(_chimera, season=False),
}
