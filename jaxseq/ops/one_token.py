"""A decoding step of a matrix state in a kernel: `pallas_kernels.one_token` with a gradient."""

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels.one_token import one_token as kernel

from .matrix_state import per_head


def one_token(token: Callable, S, rows: dict[str, jax.Array], columns: dict[str, jax.Array]):
    """Read-outs `B 1 H V` and the state `B H K V` after a token: `rows` `B 1 H K|1`, `columns` `B 1 H V`.

    `token` takes them as columns and rows of matrices; see `pallas_kernels.one_token`.
    """
    alone = lambda x: per_head(x, S.shape[1])[:, 0]
    S, out = _run(token, S, *(jax.tree.map(alone, of) for of in (rows, columns)))
    return out[:, None], S


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(token, S, rows, columns):
    return kernel(token, S, rows, columns)


def _plain(token, S, rows, columns):
    """What the kernel computes: nobody trains on single tokens, so XLA's gradient will do."""
    of = {name: x.astype(S.dtype)[..., :, None] for name, x in rows.items()}
    after, out = token(S, of | {name: x.astype(S.dtype)[..., None, :] for name, x in columns.items()})
    return after, out[..., 0, :]


def _backward(token, inputs, cotangents):
    return jax.vjp(partial(_plain, token), *inputs)[1](cotangents)


_run.defvjp(lambda token, *inputs: (_run(token, *inputs), inputs), _backward)
