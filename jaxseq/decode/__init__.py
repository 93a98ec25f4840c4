"""From a trained model to text."""

from .generate import generate as generate
from .generate import stream as stream
from .sample import Sampling as Sampling
from .sample import sample as sample
