"""Models of any mixers, on one residual block."""

from .block import Stack as Stack
from .classifier import Classifier as Classifier
from .language import LanguageModel as LanguageModel
from .named import ModelConfig as ModelConfig
from .named import mixer_names as mixer_names
from .named import named_language_model as named_language_model
from .switching_glm import SwitchingGLM as SwitchingGLM
from .switching_glm import gumbel_softmax_log_density as gumbel_softmax_log_density
from .switching_glm import one_hot_parameters as one_hot_parameters
