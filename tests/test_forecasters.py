"""Forecasting models against the authors' outputs, and what their users rely on."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import random_params
from recorded import load, recorded
from sampled import by_default

from jaxseq import Mamba
from jaxseq.layers.mlp import MLP
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.models.forecasters import (
    LinearForecaster,
    PatchForecaster,
    SequenceForecaster,
    last_value,
    seasonal_naive,
    window_mean,
)
from jaxseq.models.itransformer import ITransformer
from jaxseq.models.named_forecasters import ForecasterConfig, forecaster_names, named_forecaster


def recorded_itransformer(**fields):
    """The module of the file, and the authors' weights in its layout."""
    z = load("itransformer")
    get = lambda name: np.asarray(z[f"p.{name}"], np.float32)
    dense = lambda name: {"kernel": get(f"{name}.weight").squeeze().T, "bias": get(f"{name}.bias")}
    norm = lambda name: {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    def layer(n):
        at = f"encoder.attn_layers.{n}"
        words = {"q": "query", "k": "key", "v": "value", "out": "out"}
        attention = {f"{ours}_proj": dense(f"{at}.attention.{theirs}_projection") for ours, theirs in words.items()}
        mlp = {"up_proj": dense(f"{at}.conv1"), "down_proj": dense(f"{at}.conv2")}
        norms = {"mixer_norm": norm(f"{at}.norm1"), "mlp_norm": norm(f"{at}.norm2")}
        return {"block_0": {"mixer": attention, "mlp": mlp, **norms}}

    layers = jax.tree.map(lambda *x: np.stack(x), *(layer(n) for n in range(2)))
    params = {
        "encoder": dense("enc_embedding.value_embedding"),
        "stack": {"layers": layers},
        "norm": norm("encoder.norm"),
        "head": dense("projector"),
    }
    slots = (partial(SelfAttention, num_heads=4),) * 2
    return ITransformer(12, 16, slots, partial(MLP, hidden=32), **fields), {"params": params}, z


@pytest.mark.parametrize("fields", [{}, {"window": None, "normalise": True}], ids=["dlinear", "rlinear"])
def test_a_linear_map_in_closed_form_has_the_least_error(fields):
    """The gradient is zero there; its parameters are those that `init` makes."""
    model, rng = LinearForecaster(3, **fields), np.random.default_rng(0)
    series = np.cumsum(rng.standard_normal((200, 2)), axis=0).astype(np.float32)
    seen = np.arange(150)[:, None] + np.arange(30)
    inputs, targets = series[seen], series[seen[:, -1:] + 1 + np.arange(3)]
    halves = ({"inputs": inputs[n::2], "targets": targets[n::2]} for n in range(2))
    params = model.solved(halves, ridge=1e-9)
    made = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    slope = jax.grad(lambda params: jnp.mean((model.apply(params, inputs) - targets) ** 2))
    start = jax.tree.map(jnp.zeros_like, params)
    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    assert largest(slope(params)) <= 1e-4 * largest(slope(start))
    with pytest.raises(ValueError, match="batches is empty"):
        model.solved([])
    with pytest.raises(ValueError, match="targets has 2 steps; this forecaster has horizon=3"):
        model.solved([{"inputs": inputs, "targets": targets[:, :2]}])
    with pytest.raises(ValueError, match=r"targets is nan at \[0, 0, 0\]; LinearForecaster.solved takes finite"):
        model.solved([{"inputs": inputs, "targets": targets * np.nan}])


@recorded
def test_itransformer_is_the_authors():
    """With marks and without, permuted, and unscaled; the parameters are those that `init` makes."""
    model, params, z = recorded_itransformer()
    x, marks = (jnp.asarray(z[name], jnp.float32) for name in ("x", "x_mark"))
    made = jax.eval_shape(model.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, made)
    run = jax.jit(model.apply)
    for name, found in {
        "y": run(params, x),
        "y_with_marks": run(params, x, marks),
        "y_perm": run(params, x[..., z["perm"]]),
        "y_no_norm": jax.jit(recorded_itransformer(normalise=False)[0].apply)(params, x),
    }.items():
        np.testing.assert_allclose(found, z[name], atol=1e-5)


def itransformer(horizon, num_heads=4, dropout=0.1):
    slots = (partial(SelfAttention, num_heads=num_heads, dropout=dropout),) * 2
    return ITransformer(horizon, 16, slots, partial(MLP, hidden=16, dropout=dropout), dropout=dropout)


def test_itransformer_takes_any_number_of_variates():
    model = itransformer(5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 3)), jnp.float32)
    params, apply = random_params(model, x), jax.jit(model.apply)
    assert apply(params, jnp.concatenate([x, x], axis=2)).shape == (2, 5, 6)
    dropped = [apply(params, x, rngs={"dropout": jax.random.key(n)}) for n in range(2)]
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
    with pytest.raises(ValueError, match="horizon=0"):
        itransformer(0).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=16"):
        itransformer(5, num_heads=3).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="marks"):
        model.apply(params, x, jnp.zeros((2, 11, 4)))
    with pytest.raises(ValueError, match=r"marks is inf at \[0, 0, 0\]; ITransformer takes finite numbers"):
        model.apply(params, x, jnp.full((2, 12, 4), jnp.inf))


def windows(length=24, variates=3):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, length, variates)), jnp.float32)


MODELS = {
    "itransformer": itransformer(6),
    "dlinear": LinearForecaster(6, window=5),
    "rlinear": LinearForecaster(6, window=None, normalise=True),
    "patch": PatchForecaster(6, 16, (partial(SelfAttention, num_heads=2),), patch=8, stride=4),
    "sequence": SequenceForecaster(6, 16, (partial(Mamba, state_size=4),)),
}


@pytest.mark.parametrize("name", by_default(["itransformer", "dlinear"], MODELS))
def test_forecasters(name):
    """Where windows are normalised, one that is shifted and scaled gives the forecast that is."""
    model, x = MODELS[name], windows()
    params = random_params(model, x)
    y = jax.jit(model.apply)(params, x)
    assert y.shape == (2, 6, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's own norms promote
        half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, x.astype(jnp.bfloat16))
    assert np.linalg.norm(half.astype(jnp.float32) - y) <= 0.05 * np.linalg.norm(y)
    if name != "dlinear":
        np.testing.assert_allclose(jax.jit(model.apply)(params, 50 * x + 7), 50 * y + 7, rtol=1e-3, atol=1e-2)


def test_every_name_is_a_forecaster():
    """Of this horizon; no two have the same parameters, but that of one variate Chimera looks one way."""
    config = ForecasterConfig(width=16, depth=1, heads=2, states=2, dropout=0.1)
    shaped = lambda model, x: jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    shapes = {}
    for name in forecaster_names():
        y, shapes[name] = shaped(named_forecaster(config, name, 6, 3), windows())
        assert y.shape == (2, 6, 3)
    assert all(shapes[a] != shapes[b] for a, b in combinations(shapes, 2))
    alone = shaped(named_forecaster(config, "chimera", 6, 1), windows(variates=1))[1]
    assert alone == shaped(named_forecaster(config, "chimera-one-way", 6), windows(variates=1))[1]
    with pytest.raises(ValueError, match="no forecaster is called 'nbeats'; choose dlinear, rlinear, "):
        named_forecaster(config, "nbeats", 6)


def test_what_mixes_the_variates():
    """A mixer by name in both directions; another name, or several, is an error."""
    config = ForecasterConfig(width=16, depth=1, heads=2, inverted="gla")
    model = named_forecaster(config, "itransformer", 6)
    params = jax.eval_shape(model.init, jax.random.key(0), windows())["params"]
    assert {"forwards", "backwards"} <= set(params["stack"]["layers"]["block_0"]["mixer"])
    for fields, message in (
        (dict(inverted="glow"), "model.inverted='glow' is no mixer; choose abc, "),
        (dict(inverted="gla,mamba2"), "model.inverted='gla,mamba2' is no mixer"),
        (dict(dropout=1.0), "model.dropout=1.0 must be 0 or more and below 1"),
        (dict(width=0), "model.width=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ForecasterConfig(**fields)


@pytest.mark.parametrize("name", ["dlinear", "rlinear", "patch"])
def test_variates_by_themselves(name):
    """What one variate does says nothing of the others."""
    model, x = MODELS[name], windows()
    params, apply = random_params(model, x), jax.jit(model.apply)
    other = x.at[:, :, 1].multiply(-3)
    y, z = (apply(params, a) for a in (x, other))
    np.testing.assert_allclose(y[..., [0, 2]], z[..., [0, 2]], atol=1e-6)
    assert np.abs(y - z)[..., 1].max() > 1e-3


def test_dlinear_decomposes():
    """Against a moving mean in NumPy."""
    model, x = MODELS["dlinear"], windows()
    params = model.init(jax.random.key(0), x)["params"]
    padded = np.concatenate([np.repeat(x[:, :1], 2, 1), x, np.repeat(x[:, -1:], 2, 1)], axis=1)
    trend = np.stack([padded[:, t : t + 5].mean(axis=1) for t in range(24)], axis=1)
    y = sum(
        np.einsum("blv,ls->bsv", part, params[name]["kernel"]) + np.asarray(params[name]["bias"])[None, :, None]
        for name, part in (("trend_map", trend), ("rest_map", x - trend))
    )
    np.testing.assert_allclose(model.apply({"params": params}, x), y, atol=1e-5)


def test_naive_forecasts():
    x = windows(5)
    np.testing.assert_array_equal(last_value(x, 3), np.stack([x[:, 4]] * 3, axis=1))
    np.testing.assert_array_equal(seasonal_naive(x, 5, 2), np.stack([x[:, n] for n in (3, 4, 3, 4, 3)], axis=1))
    np.testing.assert_allclose(window_mean(x, 2)[:, 1], x.mean(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="period=6 must be at least 1 and at most the 5 steps"):
        seasonal_naive(x, 3, 6)


CHANGED = {
    "itransformer": (windows(20), "x has 20 steps; the parameters of this ITransformer are for 24"),
    "dlinear": (windows(20), "x has 20 steps; the parameters of this LinearForecaster are for 24"),
    "rlinear": (windows(20), "x has 20 steps; the parameters of this LinearForecaster are for 24"),
    "patch": (windows(40), "x has 10 patches; the parameters of this PatchForecaster are for 6"),
    "sequence": (windows(24, 4), "x has 4 variates; the parameters of this SequenceForecaster are for 3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_windows_are_named(name):
    """No variates, no steps, nothing to forecast, another shape than the parameters are for, and a number missing."""
    model, (other, message) = MODELS[name], CHANGED[name]
    init = lambda model, x: jax.eval_shape(model.init, jax.random.key(0), x)
    for x, found in ((windows(24, 0), "24 steps of 0"), (windows(0), "0 steps of 3")):
        with pytest.raises(ValueError, match=f"x has {found} variates; {type(model).__name__} takes 1 or more of each"):
            init(model, x)
    with pytest.raises(ValueError, match="horizon=0 must be at least 1"):
        init(model.clone(horizon=0), windows())
    owner = type(model).__name__
    with pytest.raises(
        ValueError, match=rf"x is nan at \[1, 20, 2\]; {owner} takes finite numbers: fill what is missing"
    ):
        model.init(jax.random.key(0), windows().at[1, 20, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, init(model, windows()), other)


@pytest.mark.parametrize("method", ["step", "init_state"])
def test_a_window_has_no_state(method):
    with pytest.raises(NotImplementedError, match=f"{method}: ITransformer .* keeps nothing of a window"):
        MODELS["itransformer"].apply({}, windows(), method=method)


def test_wrong_fields_are_named():
    init = lambda model: model.init(jax.random.key(0), windows())
    with pytest.raises(ValueError, match="window=4; LinearForecaster takes an odd number"):
        init(LinearForecaster(6, window=4))
    with pytest.raises(ValueError, match="patch=30 and stride=8; PatchForecaster takes 1 ≤ stride ≤ patch ≤ 24"):
        init(PatchForecaster(6, patch=30))
