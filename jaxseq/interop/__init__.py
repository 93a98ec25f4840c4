"""Weights of other libraries as parameters of ours."""

from .fla import fla_layer as fla_layer
from .huggingface import load_huggingface as load_huggingface
from .huggingface import save_huggingface as save_huggingface
from .huggingface import tokenizer_text as tokenizer_text
