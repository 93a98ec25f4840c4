"""Orchid: recorded values, the symmetry of its kernel, and what it refuses; the causal form's recurrence."""

import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from recorded import load, recorded
from sampled import by_default

from jaxseq import LanguageModel
from jaxseq.layers.positional_kernel import PositionalKernel
from jaxseq.mixers import Orchid
from jaxseq.ops.input_spectrum import (
    centred_convolution,
    correlation_spectrum,
    magnitude_spectrum,
    spectral_convolution,
)
from jaxseq.ops.lag_correlation import LagState, lag_correlation

WIDTH = 6
draw = lambda *shape, seed=0: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def golden(*names):
    return [jnp.asarray(load("orchid")[name], jnp.float32) for name in names]


def assert_equal_to(actual, name):
    np.testing.assert_allclose(actual, load("orchid")[name], rtol=1e-6, atol=1e-5)


@recorded
@pytest.mark.parametrize("kind", ["type1", "type2"])
def test_kernels_are_the_recorded_ones(kind):
    x, w, w_query, w_frequency, h0 = golden("x", "w_spatial", "w_spatial_q", "w_freq", "h0")
    time = centred_convolution(x, w)
    if kind == "type1":
        spectrum, whole = magnitude_spectrum(time, w_frequency, ortho=False), load("orchid")["type1_spectrum"]
    else:
        spectrum = correlation_spectrum(time, centred_convolution(x, w_query), w_frequency, ortho=False)
        whole = load("orchid")["type2_spectrum_re"] + 1j * load("orchid")["type2_spectrum_im"]
    # Of the recorded ones the part that gives a real kernel, of which half the frequencies tell all.
    half = np.arange(x.shape[1] // 2 + 1)
    real_part = (whole[:, half] + np.conj(whole[:, -half])) / 2
    np.testing.assert_allclose(spectrum, real_part, rtol=1e-6, atol=1e-5)
    assert_equal_to(spectral_convolution(x, spectrum, h0), f"{kind}_y")


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_half_of_the_frequencies_tell_all(length, window):
    """A convolution over the circle of all of them gives the same kernel; also where windows are longer than it."""
    key, query, weight = draw(2, length, 3), draw(2, length, 3, seed=1), draw(window, 3, seed=2)
    whole = np.conj(np.fft.fft(key, axis=1)) * np.fft.fft(query, axis=1) / length
    around = lambda n: np.roll(whole, window // 2 - n, axis=1)
    whole = sum(np.asarray(weight[n])[None, None] * around(n) for n in range(window))
    half = correlation_spectrum(key, query, weight)
    expected = np.fft.ifft(whole, axis=1).real
    np.testing.assert_allclose(jnp.fft.irfft(half, length, axis=1), expected, rtol=1e-4, atol=1e-5)


@recorded
def test_the_cosine_kernel_is_the_recorded_one():
    x, w, w_frequency, h0 = golden("x", "w_spatial", "w_freq", "h0")
    spectrum = magnitude_spectrum(centred_convolution(x, w), w_frequency, transform="dct")
    assert_equal_to(jax.scipy.fft.idct(spectrum, axis=1, norm="ortho"), "dct_kernel")
    assert_equal_to(spectral_convolution(x, spectrum, h0, transform="dct"), "dct_type1_y")


@recorded
def test_the_block_is_the_recorded_one(monkeypatch):
    """All of the module but h0, which was recorded as numbers."""
    names = ("x", "block_W_in", "block_W_out", "block_w_short", "w_spatial", "w_freq", "h0")
    x, w_in, w_out, w_short, w, w_frequency, h0 = golden(*names)
    monkeypatch.setattr(PositionalKernel, "__call__", lambda self, lags, span: h0)
    params = {
        "in_proj": {"kernel": w_in, "bias": jnp.zeros(3 * WIDTH)},
        "out_proj": {"kernel": w_out, "bias": jnp.zeros(WIDTH)},
        "short_conv": w_short,
        "time_conv": w,
        "frequency_conv": w_frequency,
    }
    module = Orchid(WIDTH, conditioning="magnitude", ortho=False)
    assert_equal_to(module.apply({"params": params}, x), "block_y")


@recorded
@pytest.mark.parametrize("impl", by_default(["sequential", "chunked"], ["sequential", "parallel", "chunked"]))
def test_the_causal_form_is_the_recorded_one(impl):
    x, q, k, decay, h0 = golden("x", "causal_q", "causal_k", "causal_lam", "h0")
    window = int(load("orchid")["causal_window"])
    y, state = lag_correlation(q, k, x, jnp.log(decay), h0[:window], chunk_size=5, impl=impl)
    assert_equal_to(y, "causal_y")
    assert state.correlation.shape == (2, window, WIDTH) and state.key.shape == (2, window - 1, WIDTH)


def lag_inputs(length, window, dtype=np.float64):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    tokens = [normal(2, length, 3) for _ in range(3)]
    state = LagState(normal(2, window, 3), normal(2, window - 1, 3), normal(2, window - 1, 3))
    return (*tokens, -jnp.exp(normal(3)), normal(window, 3), state)


@pytest.mark.parametrize(
    "length, window, chunk",
    by_default([(11, 3, 4)], [(1, 3, 4), (4, 1, 4), (11, 3, 4), (5, 7, 2), (9, 4, 16)]),
)
def test_forms_of_the_lag_correlation_agree(length, window, chunk):
    """In float64: values, final states and all gradients, from a state, with and without segments."""
    drawn = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, length)))
    with jax.enable_x64(True):
        inputs = lag_inputs(length, window)

        @jax.jit
        def everything(ids):
            def of(form):
                run = lambda *inputs: lag_correlation(
                    *inputs[:5], initial_state=inputs[5], segment_ids=ids, chunk_size=chunk, impl=form
                )
                out, pull = jax.vjp(run, *inputs)
                return out, pull(jax.tree.map(jnp.sin, out))

            return [of(form) for form in ("sequential", "parallel", "chunked")]

        for ids in (None, jnp.sort(drawn), drawn):
            expected, *others = everything(ids)
            for actual in others:
                assert_close(actual, expected, "float64")


def test_lag_correlation_is_its_sum():
    """Against a loop over tokens and lags."""
    length, window = 9, 4
    inputs = lag_inputs(length, window, np.float32)[:5]
    y, _ = lag_correlation(*inputs)
    q, k, v, log_decay, h = map(np.asarray, inputs)
    c, expected = np.zeros((window, 2, 3)), np.zeros(y.shape)
    for t in range(length):
        for lag in range(window):
            c[lag] = np.exp(log_decay) * c[lag] + (q[:, t] * k[:, t - lag] if t >= lag else 0)
            expected[:, t] += (h[lag] + c[lag]) * v[:, t - lag] if t >= lag else 0
    assert_close(y, expected, "mixer")


def test_lag_correlation_forgets_at_once():
    """λ = 0: each token's own products alone, in every form, with slopes."""
    q, k, v, log_decay, h = lag_inputs(9, 4, np.float32)[:5]
    none = jnp.full_like(log_decay, -jnp.inf)
    before = lambda a, lag: jnp.pad(a, ((0, 0), (lag, 0), (0, 0)))[:, : a.shape[1]]
    expected = sum((h[lag][None, None] + q * before(k, lag)) * before(v, lag) for lag in range(len(h)))
    run = lambda impl: lambda q: lag_correlation(q, k, v, none, h, chunk_size=4, impl=impl)[0]
    for impl in ("sequential", "parallel", "chunked"):
        assert_close(run(impl)(q), expected, "mixer")
        assert np.isfinite(jax.grad(lambda q, impl=impl: run(impl)(q).sum())(q)).all()


def test_the_chunked_form_keeps_no_kernel_a_token():
    """No array of T · W · D numbers, forwards or backwards."""
    length, window, width = 256, 16, 2
    arrays = [draw(1, length, width, seed=i) for i in range(3)]
    loss = lambda *a: lag_correlation(*a, -jnp.ones(width), draw(window, width), chunk_size=8)[0].sum()
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*arrays))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert length * width <= max(sizes) < length * window * width


def test_lag_correlation_refuses():
    q, h = draw(1, 4, 2), draw(3, 2)
    with pytest.raises(ValueError, match="chunk_size=0"):
        lag_correlation(q, q, q, jnp.zeros(2), h, chunk_size=0)
    with pytest.raises(ValueError, match="takes T ≥ 1 and W ≥ 1"):
        lag_correlation(q, q, q, jnp.zeros(2), h[:0])
    with pytest.raises(ValueError, match=r"initial_state.key has shape \(1, 3, 2\)"):
        lag_correlation(q, q, q, jnp.zeros(2), h, initial_state=LagState(draw(1, 3, 2), draw(1, 3, 2), draw(1, 2, 2)))
    with pytest.raises(NotImplementedError, match="impl='fast' is no form of lag_correlation"):
        lag_correlation(q, q, q, jnp.zeros(2), h, impl="fast")


def built(length=9, **fields):
    module = Orchid(WIDTH, **fields)
    return module, random_params(module, draw(2, length, WIDTH))


def shift_error(length, **fields):
    """How far a shifted sequence's output is from the shifted output."""
    module, params = built(length, **fields)
    x = draw(2, length, WIDTH)
    apply = jax.jit(module.apply)
    shifted = apply(params, jnp.roll(x, 3, axis=1))
    return float(jnp.abs(shifted - jnp.roll(apply(params, x), 3, axis=1)).max())


@pytest.mark.parametrize("length", by_default([15], [16, 15]))
@pytest.mark.parametrize("conditioning", ["magnitude", "correlation", "none"])
def test_a_shift_around_the_end_shifts_the_output(conditioning, length):
    assert shift_error(length, conditioning=conditioning) < 1e-5


@pytest.mark.parametrize("broken", [dict(padding="zero"), dict(transform="dct")], ids=["zero padding", "cosines"])
def test_what_loses_the_symmetry(broken):
    """As the class says: nothing lies beyond the ends, or the size of a cosine's coefficient depends on the place."""
    assert shift_error(16, conditioning="magnitude", **broken) > 1e-3


@pytest.mark.parametrize(
    "conditioning, transform",
    by_default([("magnitude", "dct"), ("correlation", "dft")], product(["magnitude", "correlation"], ["dft", "dct"])),
)
def test_all_tokens_and_parameters_matter(conditioning, transform):
    module, params = built(conditioning=conditioning, transform=transform)
    x = draw(2, 9, WIDTH)
    reached = jax.jit(jax.jacobian(lambda x: module.apply(params, x)[0, :, 0]))(x)[:, 0]
    assert (np.abs(reached).sum(-1) > 0).all()
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply(p, x)))))(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_silence_has_a_gradient():
    module, params = built(conditioning="magnitude")
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(module.apply(params, x))))(jnp.zeros((1, 9, WIDTH)))
    assert np.isfinite(gradient).all()


def test_the_ablation_is_linear_between_its_gates():
    """The same kernel for every sequence, so no `time` and no `frequency` weights."""
    _, params = built(conditioning="none")
    assert set(params["params"]) == {"in_proj", "out_proj", "short_conv", "static"}


def test_masked_tokens_change_nothing():
    module, params = built()
    x, mask = draw(2, 9, WIDTH), jnp.arange(9)[None].repeat(2, axis=0) < 6
    apply = jax.jit(lambda x: module.apply(params, x, mask=mask))
    other = jnp.where(mask[..., None], x, draw(2, 9, WIDTH, seed=1))
    np.testing.assert_allclose(apply(x)[:, :6], apply(other)[:, :6], atol=1e-6)
    with pytest.raises(TypeError, match="mask has shape .* and dtype float32"):
        module.apply(params, x, mask=mask.astype(jnp.float32))


def test_the_kernel_of_another_sequence():
    module, params = built()
    x, context = draw(2, 9, WIDTH), draw(2, 9, WIDTH, seed=1)
    apply = jax.jit(lambda context: module.apply(params, x, context=context))
    assert_close(apply(x), jax.jit(module.apply)(params, x), "mixer")
    assert float(jnp.abs(apply(context) - apply(x)).max()) > 1e-3
    mask = jnp.arange(9)[None] < jnp.asarray([[6], [9]])
    masked = jax.jit(lambda context: module.apply(params, x, mask=mask, context=context, context_mask=mask))
    np.testing.assert_array_equal(masked(context.at[0, 6:].set(7.0)), masked(context))
    with pytest.raises(ValueError, match="context_mask: there is no context"):
        module.apply(params, x, context_mask=mask)


def test_bfloat16_is_near_float32():
    module, params = built()
    x = draw(2, 9, WIDTH)
    half = jax.jit(Orchid(WIDTH, dtype=jnp.bfloat16).apply)(params, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert_close(half, jax.jit(module.apply)(params, x), "mixer bfloat16")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(window=4), "takes an odd window, not 4"),
        (dict(short_window=2), "takes an odd window, not 2"),
        (dict(conditioning="type3"), "conditioning='type3' is unknown; choose one of magnitude, correlation, none"),
        (dict(padding="same"), "padding='same' is unknown"),
        (dict(transform="dst"), "transform='dst' is unknown"),
        (dict(window=-1), "window=-1; Orchid takes 1 or more"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Orchid(WIDTH, **fields).init, jax.random.key(0), draw(1, 9, WIDTH))


def test_what_looks_ahead_has_no_state():
    module, params = built()
    x = draw(2, 9, WIDTH)
    with pytest.raises(NotImplementedError, match="step: Orchid is not causal"):
        module.apply(params, x[:, 0], None, method="step")
    with pytest.raises(NotImplementedError, match="init_state: Orchid is not causal"):
        module.init_state(2)
    with pytest.raises(ValueError, match="segment_ids: Orchid's transform joins"):
        module.apply(params, x, jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match="x has width 5"):
        module.apply(params, x[..., :5])
    with pytest.raises(ValueError, match="kernel has length 3; x has 9"):
        spectral_convolution(x, None, draw(3, WIDTH))
    with pytest.raises(TypeError, match="looks at the whole sequence"):
        jax.eval_shape(LanguageModel(5, WIDTH, (Orchid,)).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
