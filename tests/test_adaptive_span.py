"""Attention whose heads learn how far they see: the weights of its definition, its cost, its cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import assert_close, random_params

from jaxseq import Attention, LanguageModel
from jaxseq.layers.learned_span import bounded
from jaxseq.models.mixed_spans import rearranged
from jaxseq.ops import softmax_attention

WIDTH, HEADS = 8, 2
build = partial(Attention, WIDTH, num_heads=HEADS, max_span=8, span_ramp=3)


def drawn(seed, length=14, **fields):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, length, WIDTH)), jnp.float32)
    params = random_params(build(**fields), x)
    return {"params": params["params"] | {"span": jnp.asarray([0.3, 0.55])}}, x


def test_weights_are_those_of_the_definition():
    """a_ij = m exp(s_ij) / Σ m exp(s_ij), m = clip((R + z − x) / R, 0, 1), in value and gradient, z's included."""

    def definition(q, k, v, z, ramp):
        s = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        distance = jnp.arange(13.0)[:, None] - jnp.arange(13.0)[None]
        m = jnp.clip((ramp + z[:, None, None] - distance[None]) / ramp, 0, 1)
        m = jnp.where(distance[None] >= 0, m, 0)
        weights = m[None] * jnp.exp(s)
        return jnp.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), v)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal((2, 13, 3, 4))) for _ in range(3))
        z = jnp.asarray([0.4, 2.7, 20.0])
        forms = {impl: partial(softmax_attention, chunk_size=5, impl=impl) for impl in ("sequential", "chunked")}
        ours = {name: lambda q, k, v, z, form=form: form(q, k, v, span=z, ramp=4.0) for name, form in forms.items()}
        everything = lambda form: jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(form(*a))), (0, 1, 2, 3))
        expected, *actual = jax.jit(
            lambda *a: [everything(form)(*a) for form in (partial(definition, ramp=4), *ours.values())]
        )(q, k, v, z)
        assert np.abs(expected[1][3][:2]).min() > 1e-4 and expected[1][3][2] == 0
        for found in actual:
            assert_close(found, expected, "float64")


def test_a_span_of_everything_is_attention():
    params, x = drawn(0)
    plain = {"params": {name: leaf for name, leaf in params["params"].items() if name != "span"}}
    wide = {"params": plain["params"] | {"span": jnp.ones(HEADS)}}
    run = lambda module, params: jax.jit(module.apply)(params, x)
    expected = run(Attention(WIDTH, num_heads=HEADS), plain)
    assert_close(run(build(max_span=13), wide), expected, "mixer")
    assert np.abs(run(build(), params) - expected).max() > 1e-3


def test_the_cache_is_as_long_as_the_longest_span():
    """Built again with the window that `reach` tells: the same outputs by steps, from a cache of as many tokens."""
    params, x = drawn(0)
    reach = build().reach(params["params"]["span"])
    assert reach == 8  # ⌈0.55 · 8⌉ + 3
    short = build(window=reach)
    assert build().init_state(2).key.shape[1] == 10 and short.init_state(2).key.shape[1] == 7
    step = lambda state, x: short.apply(params, x, state, method="step")[::-1]
    steps = jax.jit(lambda: jax.lax.scan(step, short.init_state(2), x.swapaxes(0, 1))[1].swapaxes(0, 1))()
    assert_close(steps, build().apply(params, x), "mixer")
    assert np.abs(build(window=reach - 1).apply(params, x) - steps).max() > 1e-5  # none is to spare


def test_layers_of_their_own_reach():
    """Of a model: windows a layer, with the parameters of one that was trained with all alike."""
    slot = partial(Attention, num_heads=HEADS, max_span=8, span_ramp=3)
    model = LanguageModel(7, WIDTH, (slot,) * 2, mlp=None)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 14)), jnp.int32)
    params = random_params(model, tokens)["params"]
    spans = jnp.asarray([[0.0, 0.3], [0.7, 0.1]])
    params["stack"]["layers"]["block_0"]["mixer"]["span"] = spans
    windows = [build().reach(span) for span in spans]
    assert windows == [6, 9]
    short = model.clone(mixers=tuple(partial(slot, window=window) for window in windows))
    expected = jax.jit(model.apply)({"params": params}, tokens)
    assert_close(jax.jit(short.apply)({"params": rearranged(params, short.mixers)}, tokens), expected, "mixer")
    assert [state.key.shape[2] for state in short.init_state(1).layers] == [5, 8]


def test_what_spans_cost():
    """λ/M Σ z, in the collection "losses" through a model; nobody has to ask for it."""
    params, x = drawn(0)
    cost = lambda params: build(span_loss=0.5).apply(params, x, mutable=["losses"])[1]["losses"]["span"][0]
    np.testing.assert_allclose(cost(params), 0.5 * 8 * (0.3 + 0.55) / 2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(cost)(params)["params"]["span"], [2.0, 2.0], rtol=1e-6)
    assert build().apply(params, x).shape == x.shape
    model = LanguageModel(7, WIDTH, (partial(Attention, num_heads=HEADS, max_span=8),) * 3)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    _, sown = jax.eval_shape(partial(model.apply, mutable=["losses"]), params, tokens)
    assert [leaf.shape for leaf in jax.tree.leaves(sown)] == [(3,)] and set(params) == {"params"}


def test_a_bound_holds_what_would_leave_and_lets_go_what_would_not():
    x = jnp.asarray([-0.2, 0.0, 0.5, 1.0, 1.3])
    value, pull_back = jax.vjp(bounded, x)
    np.testing.assert_array_equal(value, [0, 0, 0.5, 1, 1])
    np.testing.assert_array_equal(pull_back(jnp.ones(5))[0], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(pull_back(-jnp.ones(5))[0], [-1, -1, -1, 0, 0])


@pytest.mark.parametrize("needed, span_loss", [(12, 1e-4), (1, 1e-2)], ids=["far", "near"])
def test_spans_grow_as_far_as_they_are_needed(needed, span_loss):
    """Trained from 0 to average the last tokens; where they need none, the cost keeps them at 0."""
    module = build(max_span=16, span_ramp=4, rotary_base=None, span_loss=span_loss)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 32, WIDTH)), jnp.float32)
    y = jnp.stack([x[:, max(0, t + 1 - needed) : t + 1].mean(1) for t in range(32)], axis=1)
    params = jax.jit(module.init)(jax.random.key(0), x)
    optimizer = optax.adam(2e-2)

    def loss(params):
        found, sown = module.apply(params, x, mutable=["losses"])
        return jnp.mean((found - y) ** 2) + sown["losses"]["span"][0]

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=300))(params)
    z = 16 * np.clip(params["params"]["span"], 0, 1)
    assert (5 < z.max() < 13) if needed == 12 else z.max() < 0.7, z


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_span": 0}, "max_span=0; Attention takes 1 or more"),
        ({"span_ramp": 0}, "span_ramp=0; Attention takes 1 or more"),
        ({"block_size": 4}, "max_span=8 and block_size=4; Attention takes one"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(**fields).init, jax.random.key(0), jnp.zeros((1, 2, WIDTH)))


def test_wrong_spans_are_named():
    q = jnp.zeros((1, 3, 2, 4))
    with pytest.raises(ValueError, match="span is between a key and a later query"):
        softmax_attention(q, q, q, span=jnp.ones(2), causal=False)
    with pytest.raises(ValueError, match="ramp=0; softmax_attention takes a number of tokens above 0"):
        softmax_attention(q, q, q, span=jnp.ones(2), ramp=0)
    with pytest.raises(ValueError, match="span has shape .3,. "):
        softmax_attention(q, q, q, span=jnp.ones(3))
    with pytest.raises(ValueError, match="max_span=None; Attention without a learned span"):
        Attention(WIDTH).reach(jnp.ones(2))
