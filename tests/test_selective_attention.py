"""Selective attention: its equation, what is selected, what selecting costs, and how it leaves a model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close

from jaxseq import LanguageModel
from jaxseq.analysis import sown
from jaxseq.mixers import MinGRU, SelectiveAttention
from jaxseq.train import TrainConfig, cross_entropy, fit

WIDTH = 8


def build(**fields):
    return SelectiveAttention(WIDTH, num_heads=2, **fields)


@pytest.fixture(scope="module")
def drawn():
    """Parameters far from their start, and an input."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 13, WIDTH)), jnp.float32)
    shapes = jax.eval_shape(build().init, jax.random.key(0), x)
    assert shapes.keys() == {"params"}  # what is sown is no parameter
    return jax.tree.map(lambda p: jnp.asarray(0.6 * rng.standard_normal(p.shape), p.dtype), shapes), x


def by_hand(params, x, selected, seen, base=10000.0):
    """The docstring's equation, token by token and head by head, in float64."""
    p = {name: {k: np.asarray(v, np.float64) for k, v in layer.items()} for name, layer in params["params"].items()}
    x = np.asarray(x, np.float64)
    heads = WIDTH // 4
    chance = 1 / (1 + np.exp(-(x @ p["select_proj"]["kernel"] + p["select_proj"]["bias"])[..., 0]))
    q, k, v = ((x @ p[name]["kernel"]).reshape(*x.shape[:2], heads, 4) for name in ("q_proj", "k_proj", "v_proj"))
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(2) / 2)
    turn = np.exp(1j * angles)[:, None]
    q, k = ((a[..., :2] + 1j * a[..., 2:]) * turn for a in (q, k))
    y = x.copy()
    for b, t in np.ndindex(x.shape[:2]):
        keys = [j for j in range(t + 1) if seen(chance[b])[j]]
        if not selected(chance[b])[t]:
            continue
        logits = np.einsum("hc,jhc->hj", q[b, t].conj(), k[b, keys]).real / 2
        weights = np.exp(logits - logits.max(1, keepdims=True))
        o = np.einsum("hj,jhc->hc", weights / weights.sum(1, keepdims=True), v[b, keys])
        y[b, t] += chance[b, t] * (o.reshape(-1) @ p["out_proj"]["kernel"])
    return y


def largest(count):
    return lambda chance: chance >= np.sort(chance)[-count]


EVERY = lambda chance: np.ones_like(chance, bool)
ABOVE = lambda chance: chance > 0.5


@pytest.mark.parametrize(
    "fields, selected, seen",
    [
        ({}, EVERY, EVERY),
        ({"threshold": 0.5}, ABOVE, ABOVE),
        ({"threshold": 0.5, "keys": "all"}, ABOVE, EVERY),
        ({"top": 4}, largest(4), largest(4)),
        ({"top": 50}, EVERY, EVERY),
    ],
    ids=["training", "threshold", "all keys", "top", "top of fewer"],
)
def test_it_is_the_equation(drawn, fields, selected, seen):
    params, x = drawn
    y = jax.jit(build(**fields).apply)(params, x)
    assert_close(np.asarray(y, np.float64), by_hand(params, x, selected, seen), "mixer")


def test_float64(drawn):
    params, x = drawn
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x))
        y = jax.jit(build(threshold=0.5, param_dtype=jnp.float64).apply)(params, x)
        assert y.dtype == jnp.float64
        assert_close(np.asarray(y), by_hand(params, x, ABOVE, ABOVE), 1e-12)


def test_top_is_a_threshold_that_is_known_beforehand(drawn):
    """With gradients. Ranks are of one sequence: packed ones are refused."""
    params, x = drawn
    x = x[:1]
    _, sown = jax.jit(partial(build().apply, mutable=["intermediates"]))(params, x)
    (chance,) = sown["intermediates"]["chance"]
    fourth, fifth = np.sort(np.asarray(chance[0]))[[-4, -5]]
    loss = lambda module: lambda params: jnp.sum(jnp.sin(module.apply(params, x)))
    forms = [build(top=4), build(threshold=float(fourth + fifth) / 2)]
    ranked, thresholded = (jax.jit(jax.value_and_grad(loss(module)))(params) for module in forms)
    assert_close(ranked, thresholded, "mixer")
    with pytest.raises(ValueError, match="segment_ids: top=4 ranks all tokens of a row; give one sequence a row"):
        build(top=4).apply(params, x, jnp.asarray([[0] * 6 + [1] * 7]))


def test_unselected_tokens_take_no_room(drawn):
    """A cache for all selected tokens but the last decodes as a full one does; a shorter one forgets."""
    params, x = drawn
    module = build(threshold=0.5)
    whole, sown = jax.jit(partial(module.apply, mutable=["intermediates"]))(params, x)
    most = int((sown["intermediates"]["chance"][0] > 0.5).sum(1).max())
    assert 2 <= most < x.shape[1]

    def decoded(length):
        step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
        return jax.lax.scan(step, module.init_state(2, max_length=length), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    assert_close(decoded(most - 1), whole, "mixer")
    assert np.abs(np.asarray(decoded(most - 2) - whole)).max() > 1e-3


def test_the_loss_is_what_selection_costs(drawn):
    """λ relu(mean p − K/N): zero within the budget, else with a gradient that lowers p."""
    params, x = drawn
    chance = jax.jit(partial(build().apply, mutable=["intermediates"]))(params, x)[1]["intermediates"]["chance"][0]

    @partial(jax.jit, static_argnames="budget")
    def cost(params, **fields):
        return build(selection_loss=0.5, **fields).apply(params, x, mutable=["losses"])[1]["losses"]["selection"][0]

    np.testing.assert_allclose(cost(params), 0.5 * (chance.mean() - 13**-0.5), rtol=1e-5)
    np.testing.assert_allclose(cost(params, budget=1), 0.5 * (chance.mean() - 1 / 13), rtol=1e-5)
    assert cost(params, budget=13) == 0
    assert jax.jit(jax.grad(cost))(params)["params"]["select_proj"]["bias"][0] > 0
    assert jax.eval_shape(build().apply, params, x).shape == x.shape  # nobody has to ask for it


def test_losses_leave_a_language_model_and_train_it():
    """Through the scan over depth and its rematerialisation; a large weight closes the gates."""
    slot = partial(SelectiveAttention, num_heads=2, selection_loss=3.0, budget=1)
    model = LanguageModel(7, WIDTH, (slot,) * 2, mlp=None)
    tokens = np.random.default_rng(0).integers(0, 7, (4, 8)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)

    def loss(params, batch, key):
        logits, sown = model.apply(params, batch["inputs"], mutable=["losses"])
        cost = sum(jnp.sum(x) for x in jax.tree.leaves(sown["losses"]))
        return cross_entropy(logits, batch["inputs"])[0] + cost, {"loss": cost}

    sown = jax.eval_shape(partial(model.apply, mutable=["losses"]), params, tokens)[1]["losses"]
    assert [x.shape for x in jax.tree.leaves(sown)] == [(2,)]
    config = TrainConfig(steps=30, batch_size=4, learning_rate=6e-2, warmup_steps=5)
    trained = fit(loss, lambda key: model.init(key, tokens), lambda step: {"inputs": tokens}, config=config)
    cost = jax.jit(lambda params: loss(params, {"inputs": tokens}, None)[1]["loss"])
    before, after = (float(cost(p)) for p in (params, trained.params))
    assert after < 0.2 * before


def test_chances_of_all_layers_leave_a_language_model():
    """Rows in batches of which the last is short; a model without selection has none."""
    slots = (partial(SelectiveAttention, num_heads=2), MinGRU)
    model = LanguageModel(7, WIDTH, slots * 2, mlp=None)
    tokens = np.random.default_rng(0).integers(0, 7, (5, 9)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    _, kept = jax.jit(partial(model.apply, mutable=["intermediates"]))(params, tokens)
    whole = kept["intermediates"]["stack"]["layers"]["block_0"]["mixer"]["chance"][0]
    assert whole.shape == (2, 5, 9)
    assert_close(np.sort(sown(model, params, tokens, "chance", batch_size=2)), np.sort(np.ravel(whole)), "mixer")
    assert sown(model, params, tokens, "choice").size == 0
    with pytest.raises(ValueError, match="batch_size=0; sown takes 1 or more"):
        sown(model, params, tokens, "chance", batch_size=0)


def test_ranks_look_ahead(drawn):
    params, x = drawn
    module = build(top=4)
    with pytest.raises(NotImplementedError, match=r"top=4. looks ahead: it has no state"):
        module.init_state(2, max_length=4)
    with pytest.raises(NotImplementedError, match="has no state"):
        module.apply(params, x, build().init_state(2, max_length=4), method="prefill")
    with pytest.raises(NotImplementedError, match="has no state"):
        model = LanguageModel(5, WIDTH, (partial(SelectiveAttention, num_heads=2, top=4),))
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"keys": "none"}, "keys='none' is unknown to SelectiveAttention; choose one of selected, all"),
        ({"threshold": 1.0}, "threshold=1.0; SelectiveAttention takes 0 or more, below 1"),
        ({"top": 0}, "top=0; SelectiveAttention takes 1 or more"),
        ({"budget": -1}, "budget=-1; SelectiveAttention takes 1 or more"),
    ],
)
def test_wrong_fields_are_named(drawn, fields, message):
    params, x = drawn
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(**fields).apply, params, x)
    with pytest.raises(ValueError, match="max_length=-1; SelectiveAttention takes 0 or more"):
        build().init_state(1, max_length=-1)
