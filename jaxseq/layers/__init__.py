"""Small parts that mixers and models share."""

from .bidirectional import Bidirectional as Bidirectional
from .gated_mlp import GatedMLP as GatedMLP
from .mixer import Mixer as Mixer
from .ngram_embedding import NgramEmbedding as NgramEmbedding
from .rotary import rotary as rotary
from .short_convolution import ShortConvolution as ShortConvolution
