"""jaxseq: input-dependent sequence models, every mixer an associative scan over a monoid."""

from .mixers import GLA as GLA
from .mixers import S4D as S4D
from .mixers import Attention as Attention
from .mixers import Mamba as Mamba
from .models import Classifier as Classifier
from .models import LanguageModel as LanguageModel

__version__ = "0.1.0"
