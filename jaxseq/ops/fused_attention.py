"""Softmax attention by the kernel that comes with the platform: cuDNN's on an NVIDIA GPU, for what it can do."""

import jax
import jax.numpy as jnp


def unfit(q, k, v, causal: bool, window: int | None, beyond: list[str]) -> str | None:
    """What cuDNN asks of queries `B T H K`, keys and values `B S G …` that these are not; None where it serves.

    Arrays may be shapes and dtypes alone. `beyond` names arguments that are given and that it knows nothing of.
    """
    (_, length, _, K), (_, size, _, V) = q.shape, v.shape
    dtypes = {jnp.dtype(x.dtype) for x in (q, k, v)}
    asked = [
        (not beyond, f"no {', '.join(beyond)}"),
        (
            dtypes in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}),
            f"query, key and value in bfloat16 or in float16; they are in {', '.join(sorted(map(str, dtypes)))}",
        ),
        (
            K == V and K % 8 == 0 and K <= 256,
            f"keys and values of one width, a multiple of 8 up to 256; they are {K} and {V} wide",
        ),
        # It counts positions from the first query and the first key, not from the last ones.
        (not causal or length == size, f"as many keys as queries where it is causal; there are {size} and {length}"),
        (causal or window is None, f"a window where it is causal alone; window={window}"),
        (causal or size % 2 == 0, f"an even number of keys where it is not causal; there are {size}"),
    ]
    return next((words for served, words in asked if not served), None)


def fused_attention(q, k, v, causal: bool, window: int | None, beyond: list[str]):
    """Read-outs `B T H V` of scaled queries `B T H K`, keys `B S G K` and values `B S G V`.

    Raises:
      NotImplementedError: it is none of cuDNN's, or there is no cuDNN here.
    """
    refused = "impl='fused' of softmax_attention takes"
    if words := unfit(q, k, v, causal, window, beyond):
        raise NotImplementedError(f"{refused} {words}.")
    seen = None if window is None else (window - 1, 0)  # behind a query and ahead of it
    length, even = q.shape[1], lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # for the gradient
    try:
        o = jax.nn.dot_product_attention(
            even(q), even(k), even(v), scale=1.0, is_causal=causal, local_window_size=seen, implementation="cudnn"
        )
        return o[:, :length]
    except RuntimeError as error:
        raise NotImplementedError(f"{refused} an NVIDIA GPU whose cuDNN does this: {error}") from error
