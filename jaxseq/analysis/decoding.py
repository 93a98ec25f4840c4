"""How fast a language model decodes, and what it has to keep for it."""

from statistics import median

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Int, typed
from .timing import timed


def state_bytes(model, context: int) -> int:
    """Bytes that the layers of a model keep for one sequence of `context` tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, max_length=context))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.layers))


@typed
def decoding_speeds(
    model,
    params,
    tokens: Int[Array, "B T"],
    contexts: tuple[int, ...],
    *,
    count: int = 128,
    repeats: int = 5,
    seconds: float = 0.2,
    piece: int = 128,
) -> list[float]:
    """Tokens a second, each the likeliest next one, after contexts of so many of the `tokens`.

    A context is read in pieces of `piece` tokens. Then all contexts take `repeats` turns, after one to warm up, of so
    many `seconds`, in which `count` tokens are decoded from there, once at least; speeds are from medians.

    Raises:
      ValueError: a context is longer than `tokens`, or is no multiple of `piece`.
    """
    for context in contexts:
        if not piece <= context <= tokens.shape[1] or context % piece:
            raise ValueError(f"contexts={contexts} of tokens {tokens.shape}; take multiples of piece={piece} up to T.")
    read = jax.jit(lambda params, part, state: model.apply(params, part, state, method="prefill"), donate_argnums=2)

    @jax.jit
    def decode(params, logits, state):
        def step(carry, _):
            logits, state = carry
            return model.apply(params, jnp.argmax(logits, -1).astype(jnp.int32), state, method="step"), None

        return lax.scan(step, (logits, state), length=count)[0]

    states = []
    for context in contexts:
        state = model.init_state(tokens.shape[0], max_length=context + count)
        for start in range(0, context, piece):
            logits, state = read(params, tokens[:, start : start + piece], state)
        states.append((logits[:, -1], state))
    times: list[list[float]] = [[] for _ in contexts]
    for turn in range(1 + repeats):
        for spent, after in zip(times, states, strict=True):
            calls = timed(decode, (params, *after), seconds)
            spent += calls if turn else []
    return [1e3 * tokens.shape[0] * count / median(spent) for spent in times]
