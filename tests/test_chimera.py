"""A state space over time and variates: its names agree, its special cases are what they are called, it is bounded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from sampled import by_default
from scipy.signal import convolve

from jaxseq import ops
from jaxseq.mixers import Chimera
from jaxseq.models import ChimeraClassifier, ChimeraForecaster, ChimeraGrid

ONE_WAY = dict(bidirectional=False)
FIELDS = {
    "coupled": ONE_WAY,
    "uncoupled": ONE_WAY | dict(coupling="none"),
    "time": ONE_WAY | dict(coupling="time"),
    "scalar": ONE_WAY | dict(scalar=True),
    "parameters": ONE_WAY | dict(input_dependent=False),
    "bilinear": ONE_WAY | dict(discretisation="bilinear"),
    "euler": ONE_WAY | dict(discretisation="euler", scalar=True),
    "both directions": {},
}
SLOW = ("uncoupled", "scalar", "both directions", "bilinear", "euler")
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FIELDS]


def drawn(shape=(2, 7, 3, 4), seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(module, params, x, state=None, segment_ids=None):
    return module.apply(params, x, state, segment_ids, method="prefill")


@pytest.mark.parametrize("name", EACH)
def test_the_whole_is_its_parts_and_its_steps(name):
    """And segments are grids of their own."""
    module, x = Chimera(4, state_size=3, **FIELDS[name]), drawn()
    params = random_params(module, x)

    @jax.jit
    def forms(params, x):
        first, state = run(module, params, x[:, :3])
        rest, state = run(module, params, x[:, 3:], state)
        step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
        last, y = jax.lax.scan(step, module.init_state(2, variates=3), x.swapaxes(0, 1))
        packed, _ = run(module, params, x, None, jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * 2))
        parts, alone = jnp.concatenate([first, rest], axis=1), module.apply(params, x[:, 3:])
        return run(module, params, x), (parts, state), (y.swapaxes(0, 1), last), packed, alone

    whole, parts, steps, packed, alone = forms(params, x)
    assert_close(parts, whole, "mixer")
    assert_close(steps, whole, "mixer")
    np.testing.assert_array_equal(packed[:, :3], parts[0][:, :3])
    assert_close(packed[:, 3:], alone, "mixer")


@pytest.mark.parametrize("coupling", by_default(["both"], ["both", "time"]))
def test_gradients_pass_the_state(coupling):
    module, x = Chimera(4, state_size=3, coupling=coupling, **ONE_WAY), drawn()
    params = random_params(module, x)

    def in_parts(params, x):
        first, state = run(module, params, x[:, :3])
        return jnp.concatenate([first, run(module, params, x[:, 3:], state)[0]], axis=1)

    slopes = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))) for f in (module.apply, in_parts)]
    whole, parts = (slope(params, x) for slope in slopes)
    assert_close(parts, whole, "mixer")


@pytest.mark.parametrize("coupling", ["time", "none"])
def test_without_coupling_it_is_a_selective_scan_of_each_axis(coupling):
    """With b̄ = Δ b: Mamba's recurrence over the steps of each variate, and beside it over the variates of each step."""
    x = drawn()
    module = Chimera(4, state_size=3, coupling=coupling, discretisation="euler", bidirectional=False)
    params = random_params(module, x)
    p = {name.removeprefix("forwards_"): value for name, value in params["params"].items()}

    def scanned(axis, rows):
        dt = jax.nn.softplus(rows @ p[f"dt_{axis}_proj"]["kernel"] + p[f"dt_{axis}_bias"][None, None])
        B, C = (rows @ p[f"{name}_{axis}_proj"]["kernel"] for name in "bc")
        return ops.selective_scan(rows, dt, -jnp.exp(p[f"A_{axis}"]), B, C)[0]

    scanned = jax.jit(scanned, static_argnums=0)
    expected = scanned("time", x.swapaxes(1, 2).reshape(6, 7, 4)).reshape(2, 3, 7, 4).swapaxes(1, 2)
    if coupling == "none":
        expected += scanned("variates", x.reshape(14, 3, 4)).reshape(2, 7, 3, 4)
    assert_close(jax.jit(module.apply)(params, x), expected, "mixer")


def test_constant_coefficients_are_a_convolution():
    """Of both axes, with the response to an impulse: the data-independent S4 of two dimensions."""
    module, x = Chimera(4, state_size=3, input_dependent=False, bidirectional=False), drawn((1, 9, 6, 4))
    params, run = random_params(module, x), jax.jit(module.apply)
    kernel = run(params, jnp.zeros_like(x).at[0, 0, 0].set(1.0))[0]
    each = [convolve(x[0, ..., d], kernel[..., d])[:9, :6] for d in range(4)]
    assert_close(run(params, x)[0], np.stack(each, axis=-1), "mixer")


def test_exponential_smoothing_is_a_special_case():
    """One state of time, a held input, b the rate: y(t) = a y(t−1) + (1 − a) x(t)."""
    module = Chimera(1, state_size=1, input_dependent=False, coupling="time", bidirectional=False)
    x, rate = drawn((2, 12, 3, 1)), 0.7
    fixed = {"A_time": np.log(rate), "b_time": rate, "c_time": 1.0}
    start = jax.jit(module.init)(jax.random.key(0), x)["params"]
    params = {
        name: p if "dt_" in name else jnp.full_like(p, fixed[name.removeprefix("forwards_")])
        for name, p in start.items()
    }
    a = np.exp(-rate * np.asarray(jax.nn.softplus(params["forwards_dt_time_bias"])))
    smooth, y = np.zeros((2, 3, 1)), []
    for t in range(12):
        smooth = a * smooth + (1 - a) * np.asarray(x[:, t])
        y.append(smooth)
    assert_close(jax.jit(module.apply)({"params": params}, x), np.stack(y, axis=1), "mixer")


def test_both_directions_have_no_order():
    """Variates in reverse, and the two models for one another: the same outputs in reverse."""
    module, x = Chimera(4, state_size=3), drawn()
    params = random_params(module, x)
    other = {"forwards": "backwards", "backwards": "forwards"}
    swapped = {name.replace(way, other[way]): p for name, p in params["params"].items() for way in other if way in name}
    run = jax.jit(module.apply)
    assert_close(run({"params": swapped}, x[:, :, ::-1]), run(params, x)[:, :, ::-1], "mixer")


@pytest.mark.parametrize("name", EACH)
def test_it_is_causal_and_its_slopes_are_finite(name):
    """Also where steps are so large or small that a gate is shut or open."""
    module, x = Chimera(4, state_size=3, **FIELDS[name]), drawn((2, 5, 3, 4))
    params = random_params(module, x)
    slopes = jax.jit(jax.grad(lambda params, x: module.apply(params, x)[:, 3].sum(), (0, 1)))
    of_x = slopes(params, x)[1]
    assert (of_x[:, 4:] == 0).all() and (of_x[:, :4] != 0).all(axis=(0, 2, 3)).all()
    for bias in (-90.0, 90.0):
        set_to = lambda path, p, bias=bias: jnp.full_like(p, bias) if "dt_" in str(path) and "bias" in str(path) else p
        extreme = jax.tree_util.tree_map_with_path(set_to, params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes(extreme, x)))


@pytest.mark.parametrize("name", EACH)
def test_states_stay_small(name):
    """200 steps of 50 variates."""
    module = Chimera(4, state_size=3, **FIELDS[name])
    start = jax.jit(module.init)(jax.random.key(0), drawn())  # steps that remember for long
    params = jax.tree.map(lambda p, noise: p + noise / 4, start, random_params(module, drawn()))
    y, state = jax.jit(partial(run, module))(params, drawn((1, 200, 50, 4)))
    assert all(np.isfinite(a).all() and np.abs(a).max() < 1e3 for a in (y, *state))


@pytest.mark.parametrize("scale", [1, 5])
def test_states_of_held_inputs_are_bounded(scale):
    """By max |b x| / (rate (1 − ρ)), over both axes, whatever the parameters."""
    module, x = Chimera(4, state_size=3, input_dependent=False, rho=0.9, **ONE_WAY), drawn((1, 40, 20, 4))
    params = jax.tree.map(lambda p: scale * p, random_params(module, x))
    p = {name.removeprefix("forwards_"): np.asarray(value) for name, value in params["params"].items()}
    most = [np.abs(p[f"b_{axis}"] / np.exp(p[f"A_{axis}"])).max() * np.abs(x).max() for axis in ("time", "variates")]
    step = jax.jit(lambda state, x: module.apply(params, x, state, method="step")[1])
    state = module.init_state(1, variates=20)
    for _ in range(300):  # of the signs that add up
        state = step(state, jnp.abs(x[:, 0]).max() * jnp.ones_like(x[:, 0]))
        assert all(np.abs(h).max() <= 1.001 * max(most) / (1 - 0.9) for h in state)


def test_bfloat16_is_near():
    x = drawn()
    module = Chimera(4, state_size=3, **ONE_WAY)
    params = random_params(module, x)
    y = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert_close(y, jax.jit(module.apply)(params, x), "mixer bfloat16")


HEAD = partial(Chimera, state_size=2, **ONE_WAY)
HEADS = dict(trend=partial(HEAD, coupling="time"), season=partial(HEAD, coupling="none"))  # soon compiled


def test_the_forecaster_keeps_scale_and_level():
    x, model = drawn((2, 12, 3)), ChimeraForecaster(5, partial(ChimeraGrid, 4, 1, **HEADS))
    params = random_params(model, x)
    forecast = jax.jit(model.apply)
    y = forecast(params, x)
    assert y.shape == (2, 5, 3)
    np.testing.assert_allclose(forecast(params, 10 * x + 3), 10 * y + 3, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="x has 10 steps; the parameters of this ChimeraForecaster are for 12"):
        jax.eval_shape(model.apply, params, x[:, :10])
    with pytest.raises(ValueError, match="x has 12 steps of 0 variates; ChimeraForecaster takes 1 or more"):
        jax.eval_shape(model.apply, params, x[..., :0])


def test_ablations_of_a_block():
    """The slow model alone, or no gate, have fewer parameters; computed again in the backward pass nothing changes."""
    x = drawn((2, 6, 3))
    build = lambda **options: ChimeraForecaster(5, partial(ChimeraGrid, 4, 1, **HEADS | options))
    whole, params = build(), random_params(build(), x)
    kept = {"no season": dict(season=None), "no gate": dict(gated=False)}
    blocks = {name: random_params(build(**options), x)["params"]["grid"]["block_0"] for name, options in kept.items()}
    assert set(params["params"]["grid"]["block_0"]) - set(blocks["no season"]) == {"season"}
    assert set(params["params"]["grid"]["block_0"]) - set(blocks["no gate"]) == {"gate_proj"}
    slope = lambda model: jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(model.apply(params, x)))))(params)
    assert_close(slope(build(remat=True)), slope(whole), "mixer")


def test_the_classifier_leaves_out_padding():
    x, model = drawn((2, 9, 3)), ChimeraClassifier(4, partial(ChimeraGrid, 4, 1, **HEADS))
    params = random_params(model, x)
    logits, lengths = jax.jit(model.apply), jnp.asarray([5, 9])
    first, last = logits(params, x, lengths), logits(params, x.at[0, 5:].set(7.0), lengths)
    assert first.shape == (2, 4)
    assert_close(last, first, "mixer")
    assert np.abs(logits(params, x, jnp.asarray([9, 9]))[0] - first[0]).max() > 1e-3
    with pytest.raises(ValueError, match="x has 2 variates; the parameters of this ChimeraClassifier are for 3"):
        jax.eval_shape(model.apply, params, x[..., :2])
    with pytest.raises(ValueError, match=r"lengths\[1\]=10; a row of 9 tokens has 0 to 9 that count"):
        model.apply(params, x, jnp.asarray([9, 10]))
    with pytest.raises(ValueError, match=r"x is nan at \[0, 0, 0\]; ChimeraClassifier takes finite numbers"):
        model.apply(params, x.at[0, 0, 0].set(jnp.nan))


BAD = {
    "coupling='some'; Chimera takes one of both": dict(coupling="some"),
    "discretisation='exact'; Chimera takes one of zoh": dict(discretisation="exact"),
    "state_size=0; Chimera takes 1": dict(state_size=0),
    "rho=1; Chimera takes 0 or more": dict(rho=1),
    r"dt=\(1.0, 0.1\); Chimera takes a least": dict(dt=(1.0, 0.1)),
    r"x has width 4": dict(d_model=5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Chimera(**{"d_model": 4} | BAD[message]).init, jax.random.key(0), drawn())


@pytest.mark.parametrize("coupling", ["both", "time"])
def test_an_empty_grid_is_named(coupling):
    init = lambda x: jax.eval_shape(Chimera(4, coupling=coupling).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0, 3, 4\); Chimera takes at least one step of time"):
        init(jnp.zeros((2, 0, 3, 4)))
    with pytest.raises(ValueError, match="variates=0; Chimera takes 1 or more"):
        init(jnp.zeros((2, 5, 0, 4)))


@pytest.mark.parametrize("coupling", ["both", "time"])
def test_a_form_that_does_not_exist_is_named(coupling):
    with pytest.raises(NotImplementedError, match="impl='spiral' is no form of"):
        jax.eval_shape(Chimera(4, coupling=coupling, impl="spiral").init, jax.random.key(0), drawn())
