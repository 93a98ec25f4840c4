"""One token of a matrix state, for every sequence and head, in one pass over the state, which stays in its place.

    S, o = token(S, tokens)        of a head: S `K V`, tokens along its rows `K 1`, along its columns `1 V`

Decoding is bound by memory, and XLA reads a state again for each product with it. Columns know nothing of one another,
so a program has all rows of some columns: on a GPU of one head, on a TPU all columns of several heads.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .platforms import check_unchecked, tpu_parameters, triton_parameters
from .tiles import tile

Arrays = dict[str, jax.Array]
#: (state `K V`, tokens `K 1` and `1 V`) → (state, outputs `1 V`)
Token = Callable[[jax.Array, Arrays], tuple[jax.Array, jax.Array]]


def one_token(token: Token, S: jax.Array, rows: Arrays, columns: Arrays) -> tuple[jax.Array, jax.Array]:
    """The state `B H K V` after a token, in place of the one before where that is not used again, and outputs `B H V`.

    `rows` are tokens `B H K` or `B H 1`, `columns` are tokens `B H V`; all become of the state's dtype.

    Raises:
      NotImplementedError: as `platforms.check_unchecked`.
    """
    check_unchecked((S, rows, columns))
    on = lambda platform, interpret=False: partial(_call, token, platform, interpret)
    return lax.platform_dependent(S, rows, columns, cpu=on("tpu", True), tpu=on("tpu"), cuda=on("gpu"))


def _call(token: Token, platform: str, interpret: Any, S, rows: Arrays, columns: Arrays):
    batch, heads, K, V = S.shape
    chosen = tile("one_token", platform, max(K, V))
    count, part = math.gcd(batch * heads, chosen.get("heads", 1)), chosen.get("columns", V)
    # Triton knows powers of two alone, and what is filled up is a copy.
    whole = lambda width: 1 << (width - 1).bit_length() if platform == "gpu" else width

    def flat(x, *matrix):
        return jnp.pad(x.reshape(-1, *matrix), [(0, 0), *((0, whole(width) - width) for width in matrix)])

    states = flat(S, K, V)
    rows, columns = (jax.tree.map(lambda x: flat(x, 1, x.shape[-1]), of) for of in (rows, columns))
    part = min(part, states.shape[2])

    def kernel(before, row_refs, column_refs, after, outputs):
        for n in range(count):  # straight code, of values in two dimensions
            load = lambda ref, n=n: ref[n].astype(S.dtype)
            of = {name: load(ref).T for name, ref in row_refs.items()}
            of |= {name: load(ref) for name, ref in column_refs.items()}
            after[n], outputs[n] = token(before[n], of)

    state = pl.BlockSpec((count, states.shape[1], part), lambda n, j: (n, 0, j))
    along_columns = pl.BlockSpec((count, 1, part), lambda n, j: (n, 0, j))
    along_rows = lambda x: pl.BlockSpec((count, 1, x.shape[2]), lambda n, j: (n, 0, 0))
    after, outputs = pl.pallas_call(
        kernel,
        grid=(states.shape[0] // count, states.shape[2] // part),
        in_specs=[state, jax.tree.map(along_rows, rows), jax.tree.map(lambda _: along_columns, columns)],
        out_specs=[state, along_columns],
        out_shape=[
            jax.ShapeDtypeStruct(states.shape, S.dtype),
            jax.ShapeDtypeStruct((states.shape[0], 1, states.shape[2]), S.dtype),
        ],
        input_output_aliases={0: 0},
        compiler_params=tpu_parameters("parallel", "parallel") if platform == "tpu" else triton_parameters(chosen),
        interpret=interpret,
    )(states, rows, columns)
    return after[:, :K, :V].reshape(S.shape), outputs[:, 0, :V].reshape(batch, heads, V)
