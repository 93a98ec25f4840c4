"""Models of any mixers, on one residual block."""

from .block import Stack as Stack
from .classifier import Classifier as Classifier
from .language import LanguageModel as LanguageModel
