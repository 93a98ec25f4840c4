"""One file per paper; every class a Flax linen module of `layers.mixer.Mixer`'s contract."""

from .attention import Attention as Attention
from .gla import GLA as GLA
from .mamba import Mamba as Mamba
from .s4d import S4D as S4D
