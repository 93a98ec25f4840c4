"""From a trained model to text."""

from .generate import generate as generate
from .generate import stream as stream
from .sample import Sampling as Sampling
from .sample import sample as sample
from .text import Text as Text
from .text import byte_text as byte_text
