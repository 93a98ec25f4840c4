"""Parameters by name: paths such as `params/layers/block_0/mixer/query/kernel`, masks and digests made from them."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any


def path_string(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, in the tree's order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def matching(pattern: str) -> Callable[[PyTree], PyTree]:
    """A mask: tree -> the same tree with True where the regular expression is found in the path."""
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: bool(re.search(pattern, path_string(path))), tree
    )


def digest(params: PyTree) -> str:
    """SHA-256 over path, dtype, shape and bytes of every parameter, sorted by path: equal digests, equal models."""
    sha = hashlib.sha256()
    for path, leaf in sorted(named_leaves(params).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        value = np.asarray(leaf)
        sha.update(f"{path} {value.dtype} {value.shape}\n".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()
