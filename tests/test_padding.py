"""Rows of unequal length in one batch: what looks ahead sees nothing of the padding, in any model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close

from jaxseq import GLA, S4D, Attention, Classifier
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
    Performer,
    Reformer,
    SelectiveAttention,
    Synthesizer,
)
from jaxseq.models import Tagger
from jaxseq.models.block import Stack
from jaxseq.segments import padded_segments

WIDTH, LENGTH, SHORT = 8, 8, 6

#: Whole rows, padded by less than a block, or than changes the number of buckets.
AHEAD = {
    "attention": partial(SelfAttention, num_heads=2),
    "both ways": partial(Bidirectional, mixer=partial(GLA, num_heads=2)),
    "longformer": partial(Longformer, num_heads=2, window=2, dilation=(1, 2), global_tokens=(0,), causal=False),
    "bigbird": partial(BigBird, num_heads=2, block_size=2, num_window_blocks=1, num_random_blocks=0, causal=False),
    "bigbird, random": partial(
        BigBird, num_heads=2, block_size=4, num_window_blocks=1, num_global_blocks=0, num_random_blocks=1, causal=False
    ),
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


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", AHEAD)
def test_a_padded_row_is_the_row_alone(name):
    """In value and in the gradient of the parameters, whatever the padding holds."""
    stack = Stack(WIDTH, (AHEAD[name],), mlp=None, remat=False)
    x, y = drawn(1, SHORT, WIDTH), drawn(1, LENGTH, WIDTH, seed=1)
    padded = jnp.concatenate([x, 9 * drawn(1, LENGTH - SHORT, WIDTH, seed=2)], axis=1)
    batch, lengths = jnp.concatenate([padded, y]), jnp.asarray([SHORT, LENGTH])
    params = jax.tree.map(lambda x: 3 * x, jax.jit(stack.init)(jax.random.key(0), y))

    def together(params):
        rows = stack.apply(params, batch, lengths=lengths)[0]
        return rows[:1, :SHORT], rows[1:]

    def alone(params):
        return tuple(stack.apply(params, row)[0] for row in (x, y))

    def both(params):
        loss = lambda form: lambda params: sum(jnp.sum(jnp.sin(o)) for o in form(params))
        return [(form(params), jax.grad(loss(form))(params)) for form in (together, alone)]

    assert_close(*jax.jit(both)(params), 5e-5)


@pytest.mark.parametrize("model", [Classifier(3, WIDTH, vocab_size=11), Tagger(11, 3, WIDTH)], ids=["classes", "tags"])
@pytest.mark.parametrize("reversible", [False, True])
def test_models_hand_lengths_to_their_layers(model, reversible):
    if reversible and isinstance(model, Tagger):
        pytest.skip("a tagger has no reversible layers")
    fields = dict(mixers=(AHEAD["attention"], AHEAD["linformer"], partial(Attention, num_heads=2)))
    model = model.clone(**fields | ({"reversible": True} if reversible else {}))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, LENGTH)), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = jax.jit(model.apply)
    padded = apply(params, tokens, lengths=jnp.asarray([SHORT, LENGTH]))
    short, whole = apply(params, tokens[:1, :SHORT]), apply(params, tokens[1:])
    assert_close(padded[0, : short.shape[1]] if isinstance(model, Tagger) else padded[0], short[0], "mixer")
    assert_close(padded[1], whole[0], "mixer")


def test_packed_rows_may_be_padded():
    """Padding after the last segment is one more."""
    stack = Stack(WIDTH, (AHEAD["attention"],), mlp=None, remat=False)
    x, ids = drawn(1, LENGTH, WIDTH), jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]])
    params = stack.init(jax.random.key(0), x)
    padded = stack.apply(params, x, None, ids, jnp.asarray([SHORT]))[0][:, :SHORT]
    assert_close(padded, stack.apply(params, x[:, :SHORT], None, ids[:, :SHORT])[0], "mixer")
    kept = jnp.arange(LENGTH)[None] < SHORT
    np.testing.assert_array_equal(padded_segments(ids, kept), [[0, 0, 0, 2, 2, 2, -1, -1]])


def test_what_is_causal_is_left_as_it_is():
    mask = jnp.ones((1, 4), bool)
    assert past_padding(Attention(WIDTH), None, mask) == (None, {})
    for mixer in (Performer(WIDTH), KroneckerAttention(WIDTH), SelectiveAttention(WIDTH)):
        with pytest.raises(ValueError, match="mask: .* is causal here: it sees no padding behind"):
            jax.eval_shape(partial(mixer.init, mask=mask), jax.random.key(0), drawn(1, 4, WIDTH))


def test_a_row_of_padding_alone_makes_no_nan():
    for name in ("performer", "kronecker, polynomial", "kronecker", "linformer", "synthesizer", "reformer"):
        module, x = AHEAD[name](d_model=WIDTH), drawn(1, LENGTH, WIDTH)
        params = module.init(jax.random.key(0), x)
        sum_of = lambda x, m=module, p=params: jnp.sum(m.apply(p, x, mask=jnp.zeros((1, LENGTH), bool)))
        assert all(np.isfinite(part).all() for part in jax.value_and_grad(sum_of)(x)), name


@pytest.mark.parametrize("count", [-1, LENGTH + 1])
def test_impossible_lengths_are_named(count):
    with pytest.raises(ValueError, match=rf"lengths\[1\]={count}; a row of {LENGTH} tokens has 0 to {LENGTH} that"):
        Tagger(11, 3, WIDTH).init(jax.random.key(0), jnp.zeros((2, LENGTH), jnp.int32), lengths=jnp.asarray([3, count]))
