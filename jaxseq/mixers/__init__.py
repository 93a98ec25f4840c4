"""One file per paper; every class a Flax linen module of `layers.mixer.Mixer`'s contract."""

from .abc import ABC as ABC
from .attention import Attention as Attention
from .based import Based as Based
from .comba import Comba as Comba
from .delta_net import DeltaNet as DeltaNet
from .gated_delta_net import GatedDeltaNet as GatedDeltaNet
from .gla import GLA as GLA
from .gsa import GSA as GSA
from .hgrn import HGRN as HGRN
from .hgrn2 import HGRN2 as HGRN2
from .kda import KDA as KDA
from .lightnet import LightNet as LightNet
from .lightning import Lightning as Lightning
from .linear_attention import LinearAttention as LinearAttention
from .mamba import Mamba as Mamba
from .mesa_net import MesaNet as MesaNet
from .min_gru import MinGRU as MinGRU
from .min_lstm import MinLSTM as MinLSTM
from .mlstm import MLSTM as MLSTM
from .rebased import ReBased as ReBased
from .retnet import RetNet as RetNet
from .rglru import RGLRU as RGLRU
from .rodimus import Rodimus as Rodimus
from .rwkv6 import RWKV6 as RWKV6
from .rwkv7 import RWKV7 as RWKV7
from .s4d import S4D as S4D
