"""Decoding: what is drawn, ragged prompts, streaming, and a state that does not grow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import random_params

from jaxseq import Attention, LanguageModel, Mamba
from jaxseq.decode import Sampling, generate, sample, stream


@pytest.fixture(scope="module")
def hybrid():
    model = LanguageModel(37, 16, mixers=(Mamba, partial(Attention, num_heads=2)), ngrams=(2, 3))
    return model, random_params(model, jnp.zeros((1, 4), jnp.int32))


def test_greedy_decoding_is_the_argmax_of_the_whole_sequence(hybrid, key):
    model, params = hybrid
    prompt = np.array([[1, 5, 9], [7, 2, 30]])
    tokens = generate(model, params, prompt, max_tokens=6, key=key, temperature=0)
    sequence = np.concatenate([prompt, tokens], axis=1)
    logits = jax.jit(model.apply)(params, sequence)
    np.testing.assert_array_equal(tokens, np.argmax(logits[:, 2:-1], axis=-1))


def test_prompts_of_different_lengths_decode_as_alone(hybrid, key):
    model, params = hybrid
    prompt, lengths = np.array([[1, 5, 9, 11, 3], [7, 2, 0, 0, 0]]), [5, 2]
    together = generate(model, params, prompt, lengths=lengths, max_tokens=8, key=key, temperature=0)
    for row, length in enumerate(lengths):
        alone = generate(model, params, prompt[row : row + 1, :length], max_tokens=8, key=key, temperature=0)
        np.testing.assert_array_equal(together[row], alone[0])


def test_streamed_blocks_are_the_whole(hybrid, key):
    model, params = hybrid
    options = dict(max_tokens=11, key=key, temperature=0.9, top_k=20, top_p=0.95)
    whole = generate(model, params, [[3, 4]], **options)
    blocks = list(stream(model, params, [[3, 4]], block=4, **options))
    np.testing.assert_array_equal(whole, np.concatenate(blocks, axis=1))
    assert [b.shape[1] for b in blocks] == [4, 4, 3]


def test_a_stopped_row_repeats_the_stop_token(hybrid, key):
    model, params = hybrid
    free = generate(model, params, [[3, 4]], max_tokens=6, key=key)[0]
    stopped = generate(model, params, [[3, 4]], max_tokens=6, key=key, stop=int(free[2]))[0]
    first = list(free).index(free[2])
    np.testing.assert_array_equal(stopped[: first + 1], free[: first + 1])
    assert set(stopped[first:]) == {free[2]}


@pytest.mark.parametrize(
    "how, allowed",
    [
        (Sampling(0.0), {2}),
        (Sampling(1.0, top_k=2), {1, 2}),
        (Sampling(1.0, top_p=0.5), {2}),
        (Sampling(1.0, top_p=0.7), {1, 2}),
    ],
)
def test_only_allowed_tokens_are_drawn(how, allowed, key):
    logits = jnp.log(jnp.array([[0.1, 0.25, 0.6, 0.05]]))
    draws = jax.vmap(lambda k: sample(k, logits, how))(jax.random.split(key, 300))
    assert set(np.unique(draws).tolist()) == allowed


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt=np.zeros((1, 0))), "prompt has shape"),
        (dict(prompt=[[40]]), "vocabulary is \\[0, 37\\)"),
        (dict(lengths=[9]), "lengths="),
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_k=-2), "top_k=-2"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(prompt=[[1.5, 2.0]]), "prompt is of float64; tokens are whole numbers"),
        (dict(stop=37), "stop=37; the vocabulary is \\[0, 37\\)"),
        (dict(top_k=2.5), "top_k=2.5"),
    ],
)
def test_bad_requests_name_the_argument(hybrid, key, change, message):
    model, params = hybrid
    request = dict(prompt=[[3, 4]], max_tokens=2, key=key) | change
    with pytest.raises(ValueError, match=message):
        generate(model, params, **request)
