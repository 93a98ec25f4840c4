"""Autoregressive decoding: the prompt in one pass, then one token a step from a state."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .sample import Sampling, sample


def generate(model, params, prompt, *, max_tokens: int, key, lengths=None, stop: int | None = None, **sampling):
    """Continue a batch of prompts: `prompt "B P"` → tokens `"B max_tokens"`, NumPy int32.

    `model` is any with the contract of `LanguageModel`. Row b's prompt is its first `lengths[b]` tokens (all P when
    None). `temperature`, `top_k`, `top_p` are those of `Sampling`. With `stop`, a row that has drawn that token
    repeats it, and decoding ends once all have. Token i draws from `fold_in(key, i)`: a longer run begins as a
    shorter one. The state is O(1) in the tokens generated where the mixers' is.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a length outside [1, P], or a sampling option.
    """
    return np.concatenate(list(stream(
        model, params, prompt, max_tokens=max_tokens, key=key, lengths=lengths, stop=stop, block=max_tokens, **sampling
    )), axis=1)  # fmt: skip


def stream(
    model, params, prompt, *, max_tokens: int, key, lengths=None, stop: int | None = None, block: int = 16, **sampling
) -> Iterator[np.ndarray]:
    """`generate`, handed over `block` tokens at a time; what is wrong is raised before the first of them."""
    prompt, lengths = _checked_prompt(prompt, lengths, model.vocab_size)
    if max_tokens < 1 or block < 1:
        raise ValueError(f"max_tokens={max_tokens} and block={block}; generate takes 1 or more.")
    if stop is not None and not 0 <= stop < model.vocab_size:
        raise ValueError(f"stop={stop}; the vocabulary is [0, {model.vocab_size}).")
    how = Sampling(**sampling).checked()

    def blocks():
        logits, state = _prefill(model, params, prompt, lengths, prompt.shape[1] + max_tokens)
        done = jnp.zeros(len(prompt), bool)
        for start in range(0, max_tokens, block):
            count = min(block, max_tokens - start)
            tokens, logits, state, done = _decode(model, how, stop, count, params, logits, state, done, key, start)
            yield np.asarray(tokens)

    return blocks()


@partial(jax.jit, static_argnums=(0, 4))
def _prefill(model, params, prompt, lengths, max_length):
    """Logits after each prompt, and the state. Prompts are moved to the right, so that all end at the last
    position; the padding in front is a segment of its own, which every mixer forgets at the border."""
    position = jnp.arange(prompt.shape[1])[None] - (prompt.shape[1] - lengths[:, None])
    tokens = jnp.take_along_axis(prompt, jnp.maximum(position, 0), axis=1)
    segments = (position >= 0).astype(jnp.int32)
    state = model.init_state(len(prompt), max_length=max_length)
    logits, state = model.apply(params, tokens, state, segments, method="prefill")
    return logits[:, -1], state


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames="state")
def _decode(model, how, stop, count, params, logits, state, done, key, start):
    """`count` tokens, the first of them drawn from `logits`."""

    def unfinished(carry):
        i, _, _, _, done = carry
        return (i < count) & ~jnp.all(done)

    def step(carry):
        i, tokens, logits, state, done = carry
        token = sample(jax.random.fold_in(key, start + i), logits, how)
        if stop is not None:
            token = jnp.where(done, stop, token)
            done |= token == stop
        logits, state = model.apply(params, token, state, method="step")
        return i + 1, tokens.at[:, i].set(token), logits, state, done

    tokens = jnp.full((len(logits), count), 0 if stop is None else stop, jnp.int32)
    _, tokens, logits, state, done = lax.while_loop(unfinished, step, (0, tokens, logits, state, done))
    return tokens, logits, state, done


def _checked_prompt(prompt, lengths, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt has shape {prompt.shape}; generate takes tokens 'B P', at least one of each.")
    if not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"prompt is of {prompt.dtype}; tokens are whole numbers.")
    prompt = prompt.astype(np.int32)
    lengths = np.full(len(prompt), prompt.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != prompt.shape[:1] or lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(
            f"lengths={lengths.tolist()}; prompts of shape {prompt.shape} take one each in [1, {prompt.shape[1]}]."
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"prompt holds tokens {prompt.min()} … {prompt.max()}; the vocabulary is [0, {vocab_size}).")
    return prompt, lengths.astype(np.int32)
