"""Models of any mixers, on one residual block."""

from .block import Stack as Stack
from .chimera import ChimeraClassifier as ChimeraClassifier
from .chimera import ChimeraForecaster as ChimeraForecaster
from .chimera import ChimeraGrid as ChimeraGrid
from .classifier import Classifier as Classifier
from .forecasters import Forecaster as Forecaster
from .forecasters import LinearForecaster as LinearForecaster
from .forecasters import PatchForecaster as PatchForecaster
from .forecasters import SequenceForecaster as SequenceForecaster
from .forecasters import last_value as last_value
from .forecasters import seasonal_naive as seasonal_naive
from .forecasters import window_mean as window_mean
from .hiss import FlatRegressor as FlatRegressor
from .hiss import HiSS as HiSS
from .itransformer import ITransformer as ITransformer
from .language import LanguageModel as LanguageModel
from .named import ModelConfig as ModelConfig
from .named import mixer_names as mixer_names
from .named import named_language_model as named_language_model
from .named_forecasters import FORECASTERS as FORECASTERS
from .named_forecasters import ForecasterConfig as ForecasterConfig
from .regressor import SequenceRegressor as SequenceRegressor
from .switching_glm import SwitchingGLM as SwitchingGLM
from .switching_glm import gumbel_softmax_log_density as gumbel_softmax_log_density
from .switching_glm import one_hot_parameters as one_hot_parameters
from .tagger import Tagger as Tagger
