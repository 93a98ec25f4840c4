"""Performer, Linformer and Synthesizer: against recorded outputs, what approximates what, and what sees what."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from recorded import load, recorded

from jaxseq.layers.feature_maps import elu_plus_one
from jaxseq.layers.normalised import normalised_attention
from jaxseq.layers.projection import split_heads
from jaxseq.layers.random_features import (
    log_positive_features,
    orthogonal_features,
    positive_features,
    relu_features,
    trigonometric_features,
)
from jaxseq.mixers import Linformer, Performer, Reformer, Synthesizer
from jaxseq.models import Stack, mixer_names

Z = load("efficient_transformers")
by_time = lambda name: jnp.asarray(Z[name], jnp.float32).swapaxes(1, 2)


def attended(q, k, v, causal=False, epsilon=0.0):
    """Of features; the recorded causal form adds ε to the sum of the keys' features."""
    weights = jnp.einsum("bthm,bshm->bhts", q, k)
    weights = jnp.tril(weights) if causal else weights
    total = weights.sum(-1, keepdims=True) + epsilon * q.sum(-1).swapaxes(1, 2)[..., None]
    return jnp.einsum("bhts,bshv->bthv", weights / total, v)


def softmax(q, k, v, causal=False):
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    logits = jnp.where(np.tri(q.shape[1], dtype=bool), logits, -jnp.inf) if causal else logits
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits), v)


@recorded
def test_features_are_the_recorded_ones():
    q, k, v, w = by_time("q"), by_time("k"), by_time("v"), jnp.asarray(Z["favor.projection"], jnp.float32)
    phi_q, phi_k = positive_features(q, w, of_keys=False), positive_features(k, w, of_keys=True)
    np.testing.assert_allclose(phi_q, by_time("favor.phi_q"), atol=1e-5)
    np.testing.assert_allclose(phi_k, by_time("favor.phi_k"), atol=1e-5)
    np.testing.assert_allclose(attended(phi_q, phi_k, v), by_time("favor.noncausal"), atol=1e-5)
    np.testing.assert_allclose(attended(phi_q, phi_k, v, True, 1e-6), by_time("favor.causal"), atol=1e-5)
    phi_q, phi_k = relu_features(q, w), relu_features(k, w)
    np.testing.assert_allclose(phi_q, by_time("relu.phi_q"), atol=1e-5)
    np.testing.assert_allclose(attended(phi_q, phi_k, v), by_time("relu.noncausal"), atol=1e-5)
    for name, causal in (("causal", True), ("noncausal", False)):
        np.testing.assert_allclose(softmax(q, k, v, causal), by_time(f"softmax.{name}"), atol=1e-5)


@recorded
def test_linear_attention_is_the_recorded_one():
    """φ = elu + 1: of all keys, and of those before by the recurrence of `LinearAttention`."""
    phi_q, phi_k, v = elu_plus_one(by_time("q")), elu_plus_one(by_time("k")), by_time("v")
    np.testing.assert_allclose(attended(phi_q, phi_k, v), by_time("elu.noncausal"), atol=1e-5)
    o, _ = normalised_attention(phi_q, phi_k, v, epsilon=1e-10, scale=1.0)
    np.testing.assert_allclose(o, by_time("elu.causal"), atol=1e-5)


@recorded
def test_linformer_is_the_recorded_one():
    get = lambda name: jnp.asarray(Z[f"linformer.p.{name}"], jnp.float32)
    params = {f"{name}_proj": {"kernel": get(f"to_{name}.weight").T} for name in "qkv"}
    params |= {"out_proj": {"kernel": get("to_out.weight").T, "bias": get("to_out.bias")}}
    params |= {"key_mix": get("proj_k"), "value_mix": get("proj_v")}
    found = [
        Linformer(16, num_heads=heads, rank=8, max_length=32).apply(
            {"params": params}, jnp.asarray(Z["linformer.x"], jnp.float32)
        )
        for heads in (2, 4)
    ]
    errors = [float(jnp.abs(y - Z["linformer.y"]).max()) for y in found]
    assert min(errors) < 1e-5, errors


def drawn(sigma, seed, shape=(1, 128, 1, 32)):
    return (sigma * jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3))


@partial(jax.jit, static_argnums=(0, 1), static_argnames="norms")
def error(features, number, sigma, seed, **norms):
    q, k, v = drawn(sigma, seed)
    v = v / sigma
    w = orthogonal_features(jax.random.key(100 + seed), number, 32, **norms)
    exact = softmax(q, k, v)
    return jnp.linalg.norm(attended(features(q, w), features(k, w), v) - exact) / jnp.linalg.norm(exact)


def positive(x, w):
    return jnp.exp(log_positive_features(x, w))


@pytest.mark.parametrize("norms", ["chi", "constant"])
def test_the_error_falls_with_the_features(norms):
    """At 1,024 features to less than 0.4 of what it is at 32, where queries and keys are small."""
    mean = lambda number: np.mean([error(positive, number, 0.5, seed, norms=norms) for seed in range(6)])
    few, some, many = map(mean, (32, 256, 1024))
    assert many < 0.4 * few and many < some < few


def test_positive_features_stay_where_waves_explode():
    """Entries of variance 1: waves err twenty times as much; neither is of use there."""
    mean = lambda features: np.mean([error(features, 256, 1.0, seed) for seed in range(6)])
    assert 20 * mean(positive) < mean(trigonometric_features) and mean(positive) > 0.5


def test_features_are_unbiased_and_orthogonal():
    q, k, _ = drawn(0.5, 0, (1, 1, 1, 8))
    exact = jnp.exp(jnp.vdot(q, k) / 8**0.5)
    keys = jax.random.split(jax.random.key(1), 4000)
    estimate = lambda key: jnp.vdot(*(positive(x, orthogonal_features(key, 12, 8)) for x in (q, k)))
    each = jax.jit(jax.vmap(estimate))(keys)
    assert abs(each.mean() - exact) < 4 * each.std() / len(keys) ** 0.5
    w = orthogonal_features(jax.random.key(0), 20, 8)
    for block in (w[:8], w[8:16], w[16:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram, jnp.diag(jnp.diag(gram)), atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_the_mixer_is_its_equation(causal):
    """The features themselves, in float64 and without a scale."""
    with jax.enable_x64(True):
        module = Performer(8, num_heads=2, num_features=6, causal=causal, seed=3, param_dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 8)))
        params = random_params(module, x)
        w = orthogonal_features(jax.random.key(3), 6, 4).astype(jnp.float64)
        weights = params["params"]
        q, k, v = (split_heads(x @ weights[f"{name}_proj"]["kernel"], 4) for name in "qkv")
        o = attended(positive(q, w), positive(k, w), v, causal)
        expected = o.reshape(x.shape) @ weights["out_proj"]["kernel"]
        assert_close(jax.jit(module.apply)(params, x), expected, 1e-10)


def test_later_keys_change_nothing_and_large_ones_overflow_nothing():
    """Also where a later key is the largest by far: other implementations divide by it."""
    module = Performer(8, num_heads=1, num_features=16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 8)), jnp.float32)
    params, apply = random_params(module, x), jax.jit(module.apply)
    y = apply(params, x)
    moved = apply(params, x.at[:, -1].multiply(300.0))
    np.testing.assert_allclose(moved[:, :-1], y[:, :-1], atol=1e-6)
    slopes = jax.jit(jax.grad(lambda x: module.apply(params, x)[0, 4].sum()))(x.at[:, -1].multiply(300.0))
    assert np.isfinite(moved).all() and np.isfinite(slopes).all() and not slopes[0, 5:].any()


def test_features_are_drawn_again_with_a_key():
    module = Stack(8, (partial(Performer, num_heads=2, num_features=4),) * 2, mlp=None)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 8)), jnp.float32)
    params, apply = random_params(module, x), jax.jit(module.apply)
    at = lambda n: apply(params, x, rngs={"features": jax.random.key(n)})[0]
    np.testing.assert_array_equal(at(1), at(1))
    assert jnp.abs(at(1) - at(2)).max() > 1e-4
    np.testing.assert_array_equal(apply(params, x)[0], apply(params, x)[0])


def linformer(x, **fields):
    module = Linformer(8, num_heads=2, **fields)
    return module, random_params(module, x)


def test_as_many_mixtures_as_tokens_are_attention():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8)), jnp.float32)
    module, params = linformer(x, rank=7, max_length=7, sharing="key_value")
    params["params"]["key_mix"] = jnp.eye(7)
    weights = params["params"]
    q, k, v = (split_heads(x @ weights[f"{name}_proj"]["kernel"], 4) for name in "qkv")
    expected = (
        softmax(q, k, v).reshape(x.shape) @ weights["out_proj"]["kernel"] + weights["out_proj"]["bias"][None, None]
    )
    np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


def test_the_error_of_the_best_mixtures_falls_with_their_number():
    """P V of a low rank: with F = P's leading right vectors the part that mixtures leave out shrinks (theorem 1)."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 1, 16)), jnp.float32) for _ in range(3))
    P = np.asarray(jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 4))[0, 0]
    right = np.linalg.svd(P)[2]
    whole = P @ np.asarray(v)[0, :, 0]
    error = lambda rank: np.linalg.norm(P @ right[:rank].T @ right[:rank] @ np.asarray(v)[0, :, 0] - whole)
    errors = [error(rank) / np.linalg.norm(whole) for rank in (2, 8, 32, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5


@pytest.mark.parametrize("sharing, count", [("headwise", 2 * 12 * 3), ("key_value", 12 * 3), ("none", 2 * 2 * 12 * 3)])
def test_sharing_padding_and_shorter_inputs(sharing, count):
    """Padding that the mask leaves out changes nothing, whatever it holds."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 8)), jnp.float32)
    module, params = linformer(x, rank=3, max_length=12, sharing=sharing)
    mixes = [v for name, v in params["params"].items() if name.endswith("mix")]
    assert sum(mix.size for mix in mixes) == count
    mask = jnp.broadcast_to(jnp.arange(12) < 9, (2, 12))
    apply = jax.jit(module.apply)
    alone = apply(params, x[:, :9])
    np.testing.assert_allclose(apply(params, x.at[:, 9:].set(5.0), mask=mask)[:, :9], alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "random", "factorised"])
def test_synthesizer_is_its_equation(kind):
    """A shorter sequence uses the first places; what the mask leaves out may hold anything."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8)), jnp.float32)
    module = Synthesizer(8, num_heads=2, max_length=12, kind=kind, rank=3)
    params, apply = random_params(module, x), jax.jit(module.apply)
    w = jax.tree.map(lambda a: 10 * a, params["params"])
    if kind == "dense":
        hidden = jax.nn.relu(x @ w["hidden_proj"]["kernel"] + w["hidden_proj"]["bias"][None, None])
        hidden = split_heads(hidden, 4)
        scores = np.stack([hidden[:, :, h] @ w["kernel"][h] + w["bias"][h][None] for h in range(2)], axis=1)
    elif kind == "random":
        scores = jnp.broadcast_to(w["scores"][None], (2, 2, 12, 12))
    else:
        scores = jnp.stack([w["rows"][h] @ w["columns"][h].T for h in range(2)])[None].repeat(2, axis=0)
    v = split_heads(x @ w["v_proj"]["kernel"], 4)
    o = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.asarray(scores)[:, :, :9, :9]), v).reshape(x.shape)
    np.testing.assert_allclose(apply({"params": w}, x), o @ w["out_proj"]["kernel"], rtol=1e-3, atol=1e-4)
    mask = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
    alone = apply({"params": w}, x[:, :6])
    found = apply({"params": w}, x.at[:, 6:].set(7.0), mask=mask)[:, :6]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module, options, message",
    [
        (Performer(8, num_features=0), {}, "num_features=0"),
        (Performer(8, norms="none"), {}, "norms='none'; choose one of chi, constant"),
        (Performer(8, causal=False), {"segment_ids": jnp.zeros((1, 6), jnp.int32)}, "one sequence a row"),
        (Linformer(8, max_length=5), {}, "x has length 6; Linformer\\(max_length=5\\)"),
        (Linformer(8, rank=0), {}, "rank=0"),
        (Synthesizer(8, max_length=5), {}, "x has length 6; Synthesizer\\(max_length=5\\)"),
        (Synthesizer(8, kind="mixed"), {}, "kind='mixed'; choose one of dense"),
        (Synthesizer(8), {"segment_ids": jnp.zeros((1, 6), jnp.int32)}, "one sequence a row"),
        (Linformer(8, sharing="layerwise"), {}, "sharing='layerwise'; choose one of headwise"),
        (Linformer(8), {"segment_ids": jnp.zeros((1, 6), jnp.int32)}, "one sequence a row"),
    ],
)
def test_wrong_input_is_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(module.init, **options), jax.random.key(0), jnp.zeros((1, 6, 8)))


@pytest.mark.parametrize(
    "module, name",
    [
        (Performer(8, causal=False), r"Performer\(causal=False\)"),
        (Linformer(8), "Linformer"),
        (Reformer(8), "Reformer"),
        (Synthesizer(8), "Synthesizer"),
    ],
    ids=["performer", "linformer", "reformer", "synthesizer"],
)
def test_what_looks_ahead_has_no_state(module, name):
    """Nor one token at a time, nor in a stack; and no name among those that a language model takes."""
    refused = partial(pytest.raises, NotImplementedError, match=f"^{name} looks ahead: it has no state")
    x, trace = jnp.zeros((1, 6, 8)), lambda *args, **kw: jax.eval_shape(partial(module.init, **kw), *args)
    with refused():
        module.init_state(1, max_length=4)
    for method, inputs in (("step", (x[:, 0], None)), ("step", (x[:, 0], ())), ("prefill", (x, ()))):
        with refused():
            trace(jax.random.key(0), *inputs, method=method)
    with refused():
        Stack(8, (lambda d_model, **dtypes: module.clone(**dtypes),)).init_state(1)
    assert name.lower() not in mixer_names()
    y, state = jax.eval_shape(partial(module.init_with_output, method="prefill"), jax.random.key(0), x, None)[0]
    assert y.shape == x.shape and state is None
