"""Smaller models of trained ones."""

from .prune import MATRICES as MATRICES
from .prune import PruneState as PruneState
from .prune import cubic_sparsity as cubic_sparsity
from .prune import keep as keep
from .prune import masked as masked
from .prune import pruned as pruned
from .prune import sparsity_of as sparsity_of
