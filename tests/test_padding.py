"""Rows of unequal length in one batch: what looks ahead sees nothing of the padding, in any model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from sampled import by_default

from jaxseq import S4D, Attention, Classifier
from jaxseq.layers import Bidirectional
from jaxseq.layers.mixer import past_padding
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.mixers import (
    DSS,
    S4,
    S5,
    BigBird,
    KroneckerAttention,
    Linformer,
    Longformer,
    MinGRU,
    Performer,
    Reformer,
    SelectiveAttention,
    SubsampledAttention,
    Synthesizer,
)
from jaxseq.models import Tagger
from jaxseq.segments import padded_segments

WIDTH, LENGTH, SHORT = 8, 8, 6
KEPT = jnp.arange(LENGTH)[None] < jnp.asarray([SHORT, LENGTH])[:, None]

#: Whole rows, padded by less than changes the number of buckets.
AHEAD = {
    "attention": partial(SelfAttention, num_heads=2),
    "both ways": partial(Bidirectional, mixer=MinGRU),
    "longformer": partial(Longformer, num_heads=2, window=2, dilation=(1, 2), global_tokens=(0,), causal=False),
    "bigbird": partial(BigBird, num_heads=2, block_size=2, num_window_blocks=1, num_random_blocks=0, causal=False),
    "bigbird, random": partial(
        BigBird, num_heads=2, block_size=4, num_window_blocks=1, num_global_blocks=0, num_random_blocks=1, causal=False
    ),
    "bigbird, more blocks": partial(
        BigBird, num_heads=2, block_size=1, num_window_blocks=1, num_global_blocks=0, num_random_blocks=2, causal=False
    ),
    "subsampled": partial(SubsampledAttention, num_heads=2, causal=False),
    "reformer": partial(Reformer, num_heads=2, bucket_size=2, rounds=2),
    "linformer": partial(Linformer, num_heads=2, rank=3, max_length=LENGTH),
    "synthesizer": partial(Synthesizer, num_heads=2, max_length=LENGTH),
    "performer": partial(Performer, num_heads=2, num_features=4, causal=False),
    "kronecker": partial(KroneckerAttention, num_heads=2, causal=False),
    "kronecker, polynomial": partial(KroneckerAttention, num_heads=2, degree=2, causal=False),
    "selective": partial(SelectiveAttention, num_heads=2, top=3),
    "s4": partial(S4, state_size=4, bidirectional=True),
    "s4d": partial(S4D, state_size=4, bidirectional=True),
    "dss": partial(DSS, state_size=2, bidirectional=True),
    "s5": partial(S5, state_size=4, bidirectional=True),
}  # fmt: skip

DEFAULT = ("attention", "bigbird, more blocks", "linformer", "s4d")


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", by_default(DEFAULT, AHEAD))
def test_a_padded_row_is_the_row_alone(name):
    """In value and in all gradients, whatever the padding holds: that has none, and neither have other rows."""
    mixer, batch = AHEAD[name](d_model=WIDTH), drawn(2, LENGTH, WIDTH) * jnp.where(KEPT, 1, 9)[..., None]
    params = random_params(mixer, batch)
    ids, inputs = past_padding(mixer, None, KEPT)
    together = lambda params, batch: mixer.apply(params, batch, ids, **inputs)[:1, :SHORT]
    alone = lambda params, batch: mixer.apply(params, batch[:1, :SHORT])

    def gradient(form):
        value = lambda *args: (jnp.sum(jnp.sin(y := form(*args))), y)
        return jax.value_and_grad(value, (0, 1), has_aux=True)

    (_, found), (weights, slopes) = jax.jit(gradient(together))(params, batch)
    (_, expected), (own, others) = jax.jit(gradient(alone))(params, batch)
    # All parameters in one: the gradients of some are zero but for rounding.
    all_of = lambda tree: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])
    assert_close((found, slopes[:1, :SHORT], all_of(weights)), (expected, others[:1, :SHORT], all_of(own)), 5e-5)
    np.testing.assert_allclose(slopes[1:], 0, atol=1e-9)
    np.testing.assert_allclose(slopes[0, SHORT:], 0, atol=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Classifier(3, WIDTH, vocab_size=11), marks=pytest.mark.slow),
        Classifier(3, WIDTH, vocab_size=11, reversible=True),
        Tagger(11, 3, WIDTH),
    ],
    ids=["classes", "reversible", "tags"],
)
def test_models_hand_lengths_to_their_layers(model):
    """To those that take a mask, to those that take segments, and to causal ones between."""
    model = model.clone(mixers=(AHEAD["attention"], AHEAD["linformer"], partial(Attention, num_heads=2)), mlp=None)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, LENGTH)), jnp.int32)
    params = random_params(model, tokens)
    padded = jax.jit(model.apply)(params, tokens, lengths=jnp.asarray([SHORT, LENGTH]))[:1]
    alone = jax.jit(model.apply)(params, tokens[:1, :SHORT])
    assert_close(padded[:, :SHORT] if isinstance(model, Tagger) else padded, alone, "mixer")


def test_packed_rows_may_be_padded():
    """Padding after the last segment is one more, also to mixers that count segments as they come."""
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1], [3] * LENGTH])
    np.testing.assert_array_equal(padded_segments(ids, KEPT), [[0, 0, 0, 2, 2, 2, -1, -1], [6] * LENGTH])
    mixer, x = AHEAD["attention"](d_model=WIDTH), drawn(2, LENGTH, WIDTH)
    params, apply = random_params(mixer, x), jax.jit(mixer.apply)
    found = apply(params, x, past_padding(mixer, ids, KEPT)[0])[:1, :SHORT]
    assert_close(found, apply(params, x[:1, :SHORT], ids[:1, :SHORT]), "mixer")


def test_what_is_causal_is_left_as_it_is():
    mask = jnp.ones((1, 4), bool)
    assert past_padding(Attention(WIDTH), None, mask) == (None, {})
    for mixer in (Performer(WIDTH), KroneckerAttention(WIDTH), SelectiveAttention(WIDTH)):
        with pytest.raises(ValueError, match="mask: .* is causal here: it sees no padding behind"):
            jax.eval_shape(partial(mixer.init, mask=mask), jax.random.key(0), drawn(1, 4, WIDTH))


@pytest.mark.parametrize("name", ["performer", "kronecker, polynomial", "linformer", "synthesizer", "reformer"])
def test_a_row_of_padding_alone_makes_no_nan(name):
    module, x = AHEAD[name](d_model=WIDTH), drawn(1, LENGTH, WIDTH)
    params = random_params(module, x)
    total = lambda x: jnp.sum(module.apply(params, x, mask=jnp.zeros((1, LENGTH), bool)))
    assert all(np.isfinite(part).all() for part in jax.jit(jax.value_and_grad(total))(x))


@pytest.mark.parametrize("count", [-1, LENGTH + 1])
def test_impossible_lengths_are_named(count):
    with pytest.raises(ValueError, match=rf"lengths\[1\]={count}; a row of {LENGTH} tokens has 0 to {LENGTH} that"):
        Tagger(11, 3, WIDTH).init(jax.random.key(0), jnp.zeros((2, LENGTH), jnp.int32), lengths=jnp.asarray([3, count]))
