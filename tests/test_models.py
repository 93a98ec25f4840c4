"""Models are stacks of the mixers' contract: decoding equals the whole, nothing is shared that should not be."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from sampled import by_default

from jaxseq import GLA, S4D, Attention, Classifier, LanguageModel, Mamba
from jaxseq.analysis import nearest_in_size, num_parameters
from jaxseq.layers import NgramEmbedding
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.mixers import DSS, H3, LRU, RWKV7, S4, S5, LongConv, Mamba2
from jaxseq.models import ModelConfig, Tagger, named_language_model
from jaxseq.models.block import Stack
from jaxseq.train import TrainConfig, make_optimizer
from jaxseq.train.paths import named_leaves

VOCAB, WIDTH = 11, 8
gla = partial(GLA, num_heads=2)
attention = partial(Attention, num_heads=2)
convolution = partial(LongConv, max_length=4)
MODELS = {
    "one mixer": LanguageModel(VOCAB, WIDTH, (gla,) * 3),
    "hybrid, tied": LanguageModel(VOCAB, WIDTH, (partial(Mamba, state_size=4), attention) * 2, tied=True),
    "n-grams": LanguageModel(VOCAB, WIDTH, (gla,), ngrams=(2, 4), ngram_buckets=64),
    "shared": LanguageModel(VOCAB, WIDTH, (gla, attention) * 2, shared=True),
    "values of the first layer": LanguageModel(
        VOCAB, WIDTH, tuple(partial(RWKV7, num_heads=2, layer=layer, num_layers=2) for layer in range(2)), mlp=None
    ),
    "long convolutions": LanguageModel(VOCAB, WIDTH, (partial(LongConv, max_length=12), gla, None) * 2),
    "no pattern, no mlp": LanguageModel(VOCAB, WIDTH, (partial(S4D, state_size=4), gla, None, attention), mlp=None),
}
tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 9)), jnp.int32)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", by_default(["hybrid, tied", "shared", "long convolutions"], MODELS))
def test_call_is_prefill_and_steps(name):
    model = MODELS[name]
    params = random_params(model, tokens)

    @jax.jit
    def both(params):
        state = model.init_state(2, max_length=tokens.shape[1])
        prompt, state = model.apply(params, tokens[:, :4], state, method="prefill")
        step = lambda state, token: model.apply(params, token, state, method="step")[::-1]
        after, steps = jax.lax.scan(step, state, tokens[:, 4:].T)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        return model.apply(params, tokens), jnp.concatenate([prompt, steps.swapaxes(0, 1)], axis=1)

    whole, decoded = both(params)
    assert whole.shape == (2, 9, VOCAB)
    assert_close(decoded, whole, "mixer")


def test_states_of_another_stack_are_named():
    for mixers, others, message in (
        ((gla,) * 3, (gla, attention), "states has 2 entries; these 3 mixers take 1"),
        ((convolution,) * 3, (convolution,) * 2, "states has 2 entries; these 3 mixers take 3"),
        ((gla,) * 3, (gla,) * 2, r"states\[0\] holds an array of shape \(2, 1, .*its first axis is 3"),
        ((gla,) * 3, (attention,) * 3, r"state is a .*; GLA takes a MatrixState, or None"),
    ):
        stack, other = (Stack(WIDTH, slots) for slots in (mixers, others))
        with pytest.raises((ValueError, TypeError), match=message):
            jax.eval_shape(stack.init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)), other.init_state(1, max_length=4))


@pytest.mark.parametrize("mixers", [(convolution,), (convolution, gla), (convolution,) * 2, (gla, attention)])
def test_a_stack_takes_its_own_states(mixers):
    """Those that lie apart too, where the pattern does not repeat."""
    stack, x = Stack(WIDTH, mixers), jnp.ones((2, 3, WIDTH))
    params = random_params(stack, x)
    y, _ = stack.apply(params, x, stack.init_state(2, max_length=3))
    assert_close(y, stack.apply(params, x)[0], "mixer")


def test_an_empty_batch_is_refused():
    model = MODELS["hybrid, tied"]
    with pytest.raises(ValueError, match=r"x has shape \(0, 9, .*; .* takes at least one sequence"):
        jax.eval_shape(model.init, jax.random.key(0), tokens[:0])


def test_a_step_of_long_convolutions_moves_no_state():
    """Decoding in a loop: nowhere in the program do the states of all layers stand in one array."""
    model = LanguageModel(VOCAB, WIDTH, (partial(LongConv, max_length=16),) * 3, mlp=None)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    state = jax.eval_shape(lambda: model.init_state(2))
    step = lambda params: lambda state, token: model.apply(params, token, state, method="step")[::-1]
    decode = jax.jit(lambda params, state, tokens: jax.lax.scan(step(params), state, tokens.T), donate_argnums=1)
    program = decode.lower(params, state, tokens).compile().as_text()
    assert f"[2,16,{WIDTH}]" in program and f"[3,2,16,{WIDTH}]" not in program


@pytest.mark.parametrize("name", by_default(["n-grams"], ["hybrid, tied", "n-grams"]))
def test_packed_documents_do_not_meet(name):
    model = MODELS[name]
    params = random_params(model, tokens)
    ids, apply = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1]] * 2), jax.jit(model.apply)
    alone = [apply(params, part) for part in (tokens[:, :4], tokens[:, 4:8])]
    assert_close(apply(params, tokens[:, :8], ids), jnp.concatenate(alone, axis=1), "mixer")


def test_layers_do_not_share_parameters():
    model = LanguageModel(VOCAB, WIDTH, (gla,) * 3)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    kernel = params["stack"]["layers"]["block_0"]["mixer"]["q_proj"]["kernel"]
    assert kernel.shape[0] == 3
    assert all(np.abs(kernel[i] - kernel[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    shapes = lambda *mixers: jax.eval_shape(LanguageModel(VOCAB, WIDTH, mixers).init, jax.random.key(0), tokens)
    none, *single = (shapes(slot)["params"] for slot in (None, gla, attention))
    rest = count(none) - count(none["stack"]["layers"])
    of_gla, of_attention = (count(one["stack"]["layers"]) for one in single)
    assert count(shapes(*(gla,) * 4)) == rest + 4 * of_gla  # depth adds exactly its blocks
    assert count(shapes(*(gla, attention) * 2)) == rest + 2 * (of_gla + of_attention)


def test_the_values_of_the_first_layer_reach_the_others():
    """A stack of RWKV7 is its layers one by one, all after the first with what that made of its values."""
    slots = ModelConfig(mixers="gla,rwkv7,rwkv7,rwkv7").slots()
    stack, x = Stack(WIDTH, slots, mlp=None), jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, WIDTH)))
    params = random_params(stack, x)

    @jax.jit
    def by_hand(params):
        norm = lambda p, x: nn.RMSNorm().apply({"params": p}, x)
        layers, h, first = jax.tree.map(lambda leaf: leaf[0], params["layers"]), x, None
        for layer, slot in zip(layers.values(), slots, strict=True):
            mixer, y, p = slot(d_model=WIDTH), norm(layer["mixer_norm"], h), {"params": layer["mixer"]}
            if isinstance(mixer, RWKV7):
                y, _, value = mixer.apply(p, y, None, first_value=first, method="with_value")
                h, first = h + y, value if first is None else first
            else:
                h += mixer.apply(p, y)
        return norm(params["norm"], h)

    assert_close(jax.jit(stack.apply)(params, x)[0], by_hand(params["params"]), "mixer")
    mix = lambda params: ["value_up" in layer["mixer"] for layer in params["params"]["layers"].values()]
    assert mix(params) == [False, False, True, True]
    alike = Stack(WIDTH, (partial(RWKV7, num_heads=2),) * 2)  # each the first of a model
    assert mix(jax.eval_shape(alike.init, jax.random.key(0), x)) == [False]


@pytest.mark.slow
def test_shared_layers_are_one_layer():
    """As many parameters as one period has; value and gradient are those of layers that happen to be equal, summed."""
    mixers = (gla, attention) * 3
    shared, free = LanguageModel(VOCAB, WIDTH, mixers, shared=True), LanguageModel(VOCAB, WIDTH, mixers)
    params = random_params(shared, tokens)
    assert count(params) == count(
        jax.eval_shape(LanguageModel(VOCAB, WIDTH, mixers[:2]).init, jax.random.key(0), tokens)
    )

    def of_layers(params, change):
        stack = params["params"]["stack"]
        stack = stack | {"layers": jax.tree.map(change, stack["layers"])}
        return {"params": params["params"] | {"stack": stack}}

    loss = lambda model, params: jnp.sum(jnp.sin(model.apply(params, tokens)))
    gradient = lambda model, params: jax.value_and_grad(partial(loss, model))(params)
    equal = of_layers(params, lambda x: jnp.broadcast_to(x[None], (3, *x.shape)))
    (value, grads), (expected, apart) = jax.jit(lambda *of: (gradient(shared, of[0]), gradient(free, of[1])))(
        params, equal
    )
    assert_close((value, grads), (expected, of_layers(apart, lambda x: x.sum(0))), "mixer")


def test_a_module_is_no_slot():
    with pytest.raises(TypeError, match="is no slot; give a callable that takes d_model"):
        jax.eval_shape(LanguageModel(VOCAB, WIDTH, (GLA(WIDTH),) * 2).init, jax.random.key(0), tokens)
    with pytest.raises(TypeError, match="'gla' is no slot"):
        LanguageModel(VOCAB, WIDTH, ("gla",)).init_state(1)
    with pytest.raises(ValueError, match="mixers=.. is empty"):
        LanguageModel(VOCAB, WIDTH, ()).init_state(1)


def test_a_tied_head_is_the_table():
    free, tied = (LanguageModel(VOCAB, WIDTH, (gla,), tied=t) for t in (False, True))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), tokens) for m in (free, tied)]
    assert count(shapes[0]) - count(shapes[1]) == VOCAB * WIDTH
    assert "head" not in shapes[1]["params"]


def test_an_ngram_is_looked_up_where_it_ends():
    layer = NgramEmbedding(WIDTH, sizes=(2, 3), buckets=1 << 20)
    text, start = jnp.asarray([[3, 5, 7, 3, 5, 7, 5]]), jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(layer.init)(jax.random.key(0), text, start)
    apply = jax.jit(layer.apply)
    rows, _ = apply(params, text, start)
    same = np.isclose(rows[0][:, None], rows[0][None], atol=1e-6).all(-1)
    assert np.argwhere(np.triu(same, 1)).tolist() == [[2, 5]]  # 3 5 7 ends twice; every other trigram once
    first, before = apply(params, text[:, :1], start)
    rest, after = apply(params, text[:, 1:], before)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], axis=1), rows)
    np.testing.assert_array_equal(after, text[:, -2:] + 1)
    for sizes, buckets in (((1, 2), 8), ((), 8), ((2,), 0)):
        with pytest.raises(ValueError, match="NgramEmbedding takes sizes of 2 or more"):
            jax.eval_shape(NgramEmbedding(WIDTH, sizes, buckets).init, jax.random.key(0), text, start)


def test_bfloat16_logits_and_states_are_float32():
    model = LanguageModel(VOCAB, WIDTH, (gla, partial(Mamba, state_size=4)), dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)
        state = jax.eval_shape(lambda: model.init_state(2))
        logits, after = jax.eval_shape(partial(model.apply, method="prefill"), params, tokens, state)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_remat_changes_memory_alone():
    model = MODELS["one mixer"]
    params = random_params(model, tokens)
    loss = lambda p, remat: jnp.sum(jnp.sin(model.clone(remat=remat).apply(p, tokens)))
    with_remat, without = jax.jit(lambda p: [jax.value_and_grad(loss)(p, remat) for remat in (True, False)])(params)
    assert_close(with_remat, without, "mixer")


@pytest.mark.parametrize("pool, features", [("mean", None), ("last", 3)], ids=["mean of tokens", "last of features"])
def test_a_classifier_reads_only_its_lengths(pool, features):
    vocab_size = VOCAB if features is None else None
    model = Classifier(5, WIDTH, (partial(S4D, state_size=4),) * 2, vocab_size=vocab_size, pool=pool)
    rng = np.random.default_rng(0)
    x = tokens if features is None else jnp.asarray(rng.standard_normal((2, 9, features)), jnp.float32)
    params, apply = random_params(model, x), jax.jit(model.apply)
    padded = x.at[0, 4:].set(x[1, :5])
    logits = apply(params, padded, jnp.asarray([4, 9]))
    assert logits.shape == (2, 5)
    assert_close(logits[:1], apply(params, x[:1, :4]), "mixer")
    assert_close(logits[1:], apply(params, x[1:]), "mixer")


def test_a_tagger_answers_for_every_token_from_all_of_them():
    """Where the mixers look ahead; with causal ones from those before."""
    heads = {"num_heads": 2}
    for mixer, sees_all in ((partial(SelfAttention, **heads), True), (partial(Attention, **heads), False)):
        model = Tagger(VOCAB, 3, WIDTH, (mixer,) * 2)
        params, apply = random_params(model, tokens), jax.jit(model.apply)
        logits = apply(params, tokens)
        assert logits.shape == (2, 9, 3)
        other = apply(params, tokens.at[:, -1].set((tokens[:, -1] + 1) % VOCAB))
        assert bool(jnp.any(other[:, :-1] != logits[:, :-1])) == sees_all


def test_positions_tell_order():
    """Attention without positions has the outputs of permuted tokens permuted; with them it has not."""
    for positions in (False, True):
        model = Tagger(VOCAB, 3, WIDTH, positions=positions)
        params, apply = random_params(model, tokens), jax.jit(model.apply)
        turned = apply(params, tokens[:, ::-1])[:, ::-1]
        same = bool(jnp.allclose(turned, apply(params, tokens), atol=1e-5))
        assert same == (not positions)


class Ones(nn.Module):
    """A branch of ones."""

    d_model: int
    dtype: Any = None
    param_dtype: Any = None

    def __call__(self, x, segment_ids=None):
        return jnp.ones_like(x)


def test_dropout_takes_channels_in_training_alone():
    """Sums of two layers' masks: the same at all times, others in each layer, sequence and step."""
    stack = Stack(64, (Ones,) * 2, mlp=None, dropout=0.5)
    x = jnp.zeros((2, 5, 64))
    params = jax.jit(stack.init)(jax.random.key(0), x)
    apply = jax.jit(lambda rngs: stack.apply(params, x, rngs=rngs)[0])
    layers = lambda y: np.asarray(y / y.max(-1, keepdims=True)).round(3)  # share of the two that a channel is left in
    first, second = (layers(apply({"dropout": jax.random.key(i)})) for i in (1, 2))
    np.testing.assert_array_equal(first, np.broadcast_to(first[:, :1], first.shape))
    np.testing.assert_allclose(np.unique(first), [0, 0.5, 1])
    assert (first[0] != first[1]).any() and (first != second).any()
    np.testing.assert_array_equal(layers(apply({})), np.ones(x.shape))


def test_dropout_has_one_mask_in_both_passes():
    """Rematerialisation draws it again, the same."""
    model = Classifier(5, WIDTH, (partial(S4D, state_size=4),) * 2, vocab_size=VOCAB, dropout=0.5)
    params, rngs = random_params(model, tokens), {"dropout": jax.random.key(1)}
    loss = lambda p, remat: jnp.sum(jnp.sin(model.clone(remat=remat).apply(p, tokens, rngs=rngs)))
    with_remat, without = jax.jit(lambda p: [jax.value_and_grad(loss)(p, remat) for remat in (True, False)])(params)
    assert_close(with_remat, without, "mixer")


def test_a_norm_of_the_layers_after_the_branch():
    stack = Stack(WIDTH, (partial(S4D, state_size=4),), mlp=None, norm="layer", prenorm=False)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, WIDTH)), jnp.float32)
    params = random_params(stack, x)
    assert set(params["params"]) == {"layers"}
    block = jax.tree.map(lambda leaf: leaf[0], params["params"]["layers"]["block_0"])
    total = x + S4D(WIDTH, state_size=4).apply({"params": block["mixer"]}, x)
    normed = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + 1e-6)
    scale, bias = (block["mixer_norm"][name][None, None] for name in ("scale", "bias"))
    assert_close(jax.jit(stack.apply)(params, x)[0], scale * normed + bias, "mixer")


STEPS = ("log_dt", "A_real", "A_imag")
#: What learns slowly and what decays, beside the kernels.
GROUPS = {
    "S4": (S4(WIDTH, 4), {*STEPS, "P", "B"}, {"C", "D"}),
    "S4D": (S4D(WIDTH, 4, bidirectional=True), {*STEPS, "B"}, {"C", "C_backward", "D"}),
    "DSS": (DSS(WIDTH, 4), set(STEPS), {"C", "D"}),
    "S5": (S5(WIDTH, 4), {"Lambda_re", "Lambda_im", "log_step", "B"}, {"C", "D"}),
    "LRU": (LRU(WIDTH, 4), {"nu_log", "theta_log", "gamma_log", "B"}, {"C", "D"}),
    "H3": (H3(WIDTH, state_size=4), {f"ssm/{name}" for name in (*STEPS, "B")}, {"ssm/C", "ssm/D"}),
    "Mamba": (Mamba(WIDTH, 4), set(), {"dt_kernel"}),
    "Mamba2": (Mamba2(WIDTH, 4, num_heads=2), set(), set()),
}


@pytest.mark.parametrize("name", by_default(["S4D", "S5", "Mamba"], GROUPS))
def test_groups_of_a_state_space(name):
    """Without a gradient only decay moves a parameter; with an equal one, what learns slowly moves less."""
    module, slow, decayed = GROUPS[name]
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))["params"]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=1e-2, state_space_learning_rate=1e-3))
    with jax.numpy_dtype_promotion("standard"):
        step = jax.jit(lambda grads: named_leaves(optimizer.update(grads, optimizer.init(ones), ones)[0]))
        still, moved = step(jax.tree.map(jnp.zeros_like, ones)), step(ones)
    kernels = {path for path in still if path.endswith("/kernel")}
    assert {path for path, x in still.items() if np.any(x)} == decayed | kernels
    assert {path for path, x in moved.items() if np.all(x > -5e-3)} == slow


def test_a_token_beyond_the_vocabulary_is_named():
    model = MODELS["n-grams"]
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    for bad in (VOCAB, -1):
        wrong = tokens.at[0, 3].set(bad)
        with pytest.raises(ValueError, match=f"vocab_size={VOCAB}"):
            jax.eval_shape(lambda params, wrong=wrong: model.apply(params, wrong), params)


def test_every_named_mixer_has_a_layer():
    assert len(ModelConfig(mixers="mamba,attention", depth=1).slots()) == 2
    first, second, third = (slot(d_model=WIDTH) for slot in ModelConfig(mixers="rwkv6,gla,lightning", depth=3).slots())
    assert [(m.layer, m.num_layers) for m in (first, third)] == [(0, 3), (2, 3)]
    assert isinstance(second, GLA)
    without = ModelConfig(mixers="gla,deltanet,mamba", depth=3, conv_window=None).slots()
    assert [slot(d_model=WIDTH).conv_window for slot in without] == [None, None, 4]  # Mamba is not without
    (own,) = ModelConfig(mixers="kroneckerattention", depth=1).slots()
    assert own(d_model=WIDTH).max_length == 1024
    long = named_language_model(ModelConfig(mixers="hyena", depth=1, ngrams=()), 9, 2048)
    (logits, _) = jax.eval_shape(long.init_with_output, jax.random.key(0), jnp.zeros((1, 2048), jnp.int32))
    assert logits.shape == (1, 2048, 9)
    one, other = ModelConfig(mixers="gla", depth=2).slots()
    assert one is other  # depth is a scan over equal slots


def test_wrong_models_are_named():
    shape = lambda model, x: jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="vocab_size=0"):
        shape(LanguageModel(0, WIDTH, (gla,)), tokens)
    with pytest.raises(ValueError, match="tokens has shape .9,."):
        shape(MODELS["one mixer"], tokens[0])
    with pytest.raises(TypeError, match="dtype float32"):
        shape(MODELS["one mixer"], tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=8"):
        shape(LanguageModel(VOCAB, WIDTH, (partial(GLA, num_heads=3),)), tokens)
    with pytest.raises(ValueError, match="pool='max'"):
        shape(Classifier(5, WIDTH, vocab_size=VOCAB, pool="max"), tokens)
    with pytest.raises(ValueError, match="norm='batch'; choose one of rms, layer"):
        shape(Classifier(5, WIDTH, vocab_size=VOCAB, norm="batch"), tokens)
    with pytest.raises(ValueError, match="dropout=1.0; a share of the channels"):
        shape(Classifier(5, WIDTH, vocab_size=VOCAB, dropout=1.0), tokens)
    with pytest.raises(ValueError, match="vocab_size=None; tokens take one"):
        shape(Classifier(5, WIDTH), tokens)


def test_the_width_that_brings_as_many_parameters():
    """Of all widths none is nearer; too few are those of the narrowest."""
    x, build = jnp.zeros((1, 3)), lambda n: nn.Dense(n)  # 4 n parameters
    assert num_parameters(build(5), x) == 20
    found = [nearest_in_size(build, parameters, x) for parameters in (1, 4, 7, 9, 401, 403)]
    assert found == [1, 1, 2, 2, 100, 101]
    with pytest.raises(ValueError, match="parameters=0; choose 1 or more"):
        nearest_in_size(build, 0, x)
