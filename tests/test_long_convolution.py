"""Long convolutions: decoding by tiles, packed sequences, split time, and the authors' layers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, segments
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recorded import load, recorded

from jaxseq.layers import implicit_filter
from jaxseq.layers.implicit_filter import ExplicitFilter, ImplicitFilter, positions
from jaxseq.mixers import BaseConv, Hyena, LongConv
from jaxseq.ops.online_convolution import cut, empty_convolution, online_convolution

D = 3


def problem(length, lags, dtype=np.float64, batch=2):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((batch, length, D)), rng.standard_normal((lags, D))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def direct(x, kernel, ids=None):
    """Σ_j k_j x_{t-j}, written out."""
    x, kernel = np.asarray(x), np.asarray(kernel)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(t + 1, len(kernel))):
            same = 1 if ids is None else (ids[:, t] == ids[:, t - j])[:, None]
            y[:, t] += same * kernel[j] * x[:, t - j]
    return y


def taps_of(kernel):
    return cut(lambda count: kernel[:count], len(kernel))


@pytest.mark.parametrize("lags", [1, 2, 7, 16])
def test_steps_are_the_convolution(lags):
    """Through several periods of the tiling, for taps that do and do not fill it."""
    with jax.enable_x64(True):
        x, kernel = problem(45, lags)

        def decode(state, x):
            y, state = online_convolution(x[:, None], taps_of(kernel), state)
            return state, y[:, 0]

        _, y = jax.jit(partial(jax.lax.scan, decode))(empty_convolution(2, lags, D, x.dtype), x.swapaxes(0, 1))
        np.testing.assert_allclose(y.swapaxes(0, 1), direct(x, kernel), atol=1e-12)


def test_a_state_of_less_room_is_a_window():
    """Through calls and steps: the last 8 of 11 lags."""
    with jax.enable_x64(True):
        x, kernel = problem(40, 11)
        outputs, state, start = [], empty_convolution(2, 8, D, x.dtype), 0
        run = jax.jit(lambda x, state: online_convolution(x, taps_of(kernel), state))
        for end in (12, *range(13, 40), 40):
            y, state = run(x[:, start:end], state)
            outputs.append(y)
            start = end
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), direct(x, kernel[:8]), atol=1e-12)


def test_a_few_tokens_of_a_long_state_are_steps():
    """Wherever in a period they begin, with the slopes of the whole; segments of one token say nothing."""
    with jax.enable_x64(True):
        x, kernel = problem(140, 128)
        run = jax.jit(lambda x, state: online_convolution(x, taps_of(kernel), state))
        loss = lambda y: jnp.sum(jnp.sin(y))

        def in_parts(x):
            state, outputs = empty_convolution(2, 128, D, x.dtype), []
            for part in jnp.split(x, [60, 62, 66, 126, 130], axis=1):
                y, state = online_convolution(part, taps_of(kernel), state)
                outputs.append(y)
            return jnp.concatenate(outputs, axis=1)

        np.testing.assert_allclose(jax.jit(in_parts)(x), direct(x, kernel), atol=1e-12)
        whole = lambda x: online_convolution(x, taps_of(kernel), empty_convolution(2, 0, D, x.dtype))[0]
        slopes = [jax.jit(jax.grad(lambda x, f=f: loss(f(x))))(x) for f in (in_parts, whole)]
        np.testing.assert_allclose(*slopes, atol=1e-10)
        state = run(x[:, :60], empty_convolution(2, 128, D, x.dtype))[1]
        assert run(x[:, 60:64], state)[1].position == 4 and run(x[:, 60:65], state)[1].position == 0
        token = jax.jit(lambda x, state: online_convolution(x, taps_of(kernel), state, jnp.ones((2, 1), jnp.int32)))
        np.testing.assert_array_equal(token(x[:, 60:61], state)[0], run(x[:, 60:61], state)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_state_in_half_precision(dtype):
    """Inputs are kept so, their sums in float32: steps are near the whole, through a period."""
    mixer = LongConv(4, max_length=64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 4)), jnp.float32)
    params, state = jax.jit(mixer.init)(jax.random.key(0), x), mixer.init_state(2, dtype=dtype)
    assert state.inputs.dtype == dtype and state.sums.dtype == state.ready.dtype == jnp.float32
    step = lambda state, x: mixer.apply(params, x, state, method="step")[::-1]
    after, y = jax.jit(partial(jax.lax.scan, step))(state, x.swapaxes(0, 1))
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    np.testing.assert_allclose(y.swapaxes(0, 1), jax.jit(mixer.apply)(params, x), atol=3e-2)


def test_calls_and_steps_in_turn():
    """Wherever in a period a call begins."""
    with jax.enable_x64(True):
        x, kernel = problem(40, 11)
        outputs, state, start = [], empty_convolution(2, 11, D, x.dtype), 0
        run = jax.jit(lambda x, state: online_convolution(x, taps_of(kernel), state))
        for end in (5, 6, 7, 20, 21, 22, 23, 39, 40):
            y, state = run(x[:, start:end], state)
            outputs.append(y)
            start = end
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), direct(x, kernel), atol=1e-12)


@pytest.mark.parametrize("cut", [1, 13])
def test_packed_sequences(cut):
    """In two calls, the second of which begins in a segment that goes on; ids that come again are told apart."""
    with jax.enable_x64(True):
        x, kernel = problem(40, 11)
        counts = segments(np.random.default_rng(1), 2, 40)
        counts[:, cut] = counts[:, cut - 1]
        counts = np.maximum.accumulate(counts, axis=1)
        ids = jnp.asarray(counts % 2)
        run = jax.jit(lambda x, state, ids: online_convolution(x, taps_of(kernel), state, ids))
        first, state = run(x[:, :cut], empty_convolution(2, 11, D, x.dtype), ids[:, :cut])
        rest, _ = run(x[:, cut:], state, ids[:, cut:])
        changes = np.cumsum(np.diff(np.asarray(ids), axis=1, prepend=ids[:, :1]) != 0, axis=1)
        np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), direct(x, kernel, changes), atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_split_over_devices(packed):
    """Values, state and gradients."""
    mesh = jax.make_mesh((3,), ("sequence",), axis_types=(AxisType.Auto,))
    x, kernel = problem(30, 9, np.float32)
    ids = jnp.asarray(segments(np.random.default_rng(1), 2, 30))
    state = empty_convolution(2, 9, D, x.dtype)
    state = state._replace(inputs=jnp.asarray(np.random.default_rng(2).standard_normal(state.inputs.shape), x.dtype))

    def run(x, kernel, state, ids):
        return online_convolution(x, taps_of(kernel), state, ids if packed else None)

    def everything(run):
        def both(x, kernel, state):
            (y, after), pull = jax.vjp(lambda x, kernel: run(x, kernel, state, ids), x, kernel)
            d_after = jax.tree.map(jnp.cos, after._replace(position=0.0))
            d_after = d_after._replace(position=np.zeros((), jax.dtypes.float0))
            return y, after, pull((jnp.sin(y), d_after))

        return jax.jit(both)(x, kernel, state)

    in_time = P(None, "sequence")
    split = jax.shard_map(run, mesh=mesh, in_specs=(in_time, P(), P(), in_time), out_specs=(in_time, P()))
    assert_close(everything(split), everything(run), "float32 transform")


@recorded
def test_hyena_is_the_authors():
    z = load("zoology_layers", None)
    get = lambda name: np.asarray(z[f"hyena.p.{name}"], np.float32)
    dense = lambda name: {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}
    short = {"kernel": get("short_filter.weight")[:, 0].T, "bias": get("short_filter.bias")}
    maps = {f"kernel_{n}": get(f"filter_fn.implicit_filter.{2 * n}.weight").T for n in range(4)}
    maps |= {f"bias_{n}": get(f"filter_fn.implicit_filter.{2 * n}.bias") for n in range(3)}
    maps |= {f"frequency_{n}": get(f"filter_fn.implicit_filter.{2 * n + 1}.freq")[0] for n in range(3)}
    params = {"in_proj": dense("in_proj"), "out_proj": dense("out_proj"), "short": short, "filter_0": maps}
    params = {"params": params | {"bias_0": get("filter_fn.bias")}}
    x = jnp.asarray(z["x"], jnp.float32)
    module = Hyena(16, max_length=32, filter_width=16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), x))
    taps = ImplicitFilter(16, 32, 16).apply({"params": maps})
    np.testing.assert_allclose(positions(32, 32, 1), z["hyena.p.filter_fn.pos_emb.z"][0], atol=1e-6)
    np.testing.assert_allclose(taps(32), z["hyena.kernel"], atol=1e-5)
    np.testing.assert_allclose(jax.jit(module.apply)(params, x), z["hyena.y"], atol=1e-5)


@recorded
def test_base_conv_is_the_authors(monkeypatch):
    """The short one and the long one, whose features of the position are learned: they stand in for ours."""
    z = load("zoology_layers", None)
    x = jnp.asarray(z["x"], jnp.float32)
    get = lambda name: jnp.asarray(z[name], jnp.float32)
    dense = lambda name: {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}
    run = lambda module, **params: jax.jit(lambda x: module.apply({"params": params}, x))(x)
    at = "baseconv_short.p"
    conv = {"kernel": get(f"{at}.conv.conv.weight")[:, 0].T, "bias": get(f"{at}.conv.conv.bias")}
    y = run(BaseConv(16), proj=dense(f"{at}.projection"), conv=conv)
    np.testing.assert_allclose(y, z["baseconv_short.y"], atol=1e-5)
    at = "baseconv_long.p"
    monkeypatch.setattr(implicit_filter, "positions", lambda count, *_: z[f"{at}.conv.pos_emb.z"][0, :count])
    maps = {f"{name}_{n}": a for n in (0, 1) for name, a in dense(f"{at}.conv.mlp.{2 * n}").items()}
    taps = ImplicitFilter(16, 32, 16, 1, sine=False).apply({"params": maps})
    np.testing.assert_allclose(taps(32), z["baseconv_long.kernel"].T, atol=1e-5)
    y = run(BaseConv(16, None, max_length=32), proj=dense(f"{at}.projection"), filter=maps)
    np.testing.assert_allclose(y, z["baseconv_long.y"], atol=1e-5)


@pytest.mark.parametrize(
    "kind", [ExplicitFilter, partial(ImplicitFilter, bands=3), partial(ImplicitFilter, sine=False)]
)
def test_few_taps_are_the_first_of_many(kind):
    """What a decoder asks for; none beyond the last lag."""
    module, counts = kind(features=4, length=12), (1, 2, 8, 12)
    taps = lambda params: [module.apply(params)(count) for count in (30, *counts)]
    many, *few = jax.jit(taps)(jax.jit(module.init)(jax.random.key(0)))
    assert many.shape == (30, 4) and not many[12:].any()
    for count, first in zip(counts, few, strict=True):
        np.testing.assert_allclose(first, many[:count], atol=1e-6)


def test_squash():
    """Taps lose λ of their size, and none changes its sign."""
    plain, squashed = (ExplicitFilter(4, 12, squash=a) for a in (0.0, 0.2))
    params = plain.init(jax.random.key(0))
    k, s = plain.apply(params)(12), squashed.apply(params)(12)
    np.testing.assert_allclose(s, np.sign(k) * np.maximum(np.abs(k) - 0.2, 0), atol=1e-7)


def test_the_size_of_the_state():
    """Two numbers a lag and channel, one more a channel, and a position; nothing where nothing follows."""
    size = lambda state: sum(x.size for x in jax.tree.leaves(state))
    assert size(LongConv(8, max_length=1000).init_state(1)) == 2 * 1024 * 8 + 8 + 1
    assert size(BaseConv(8, None, max_length=1024).init_state(1)) == 2 * 1024 * 8 + 8 + 1
    assert size(Hyena(8, max_length=16, order=3).init_state(1)) == 2 * (2 * 16 * 8 + 8 + 1) + 2 * 4 * 8
    assert size(LongConv(8).init_state(1, max_length=0)) == 8 + 1
    assert size(LongConv(8, max_length=1000).init_state(1, max_length=20)) == 2 * 32 * 8 + 8 + 1
    with pytest.raises(ValueError, match="max_length=-1; the state of LongConv takes 0 or more"):
        LongConv(8).init_state(1, max_length=-1)


def test_wrong_fields_and_lengths_are_named():
    x = jnp.zeros((1, 9, 4))
    init = lambda module: jax.eval_shape(module.init, jax.random.key(0), x)
    for module, message in {
        Hyena(4, max_length=8): r"x has 9 tokens; Hyena\(max_length=8\) takes at most as many",
        LongConv(4, max_length=8): r"x has 9 tokens; LongConv\(max_length=8\)",
        BaseConv(4, None, max_length=8): r"x has 9 tokens; BaseConv\(max_length=8\)",
        Hyena(4, order=1): "order=1; Hyena takes 2 or more",
        BaseConv(4, 0): "kernel_size=0; BaseConv takes 1 or more, or None",
        LongConv(4, squash=-1.0): "squash=-1.0; LongConv takes 0 or more",
        LongConv(4, max_length=0): "x has 9 tokens|max_length=0; LongConv takes 1 or more",
    }.items():
        with pytest.raises(ValueError, match=message):
            init(module)


@pytest.mark.parametrize(
    "x, state, taps, message",
    [
        ((2, 0, 3), (2, 4, 3), 3, r"x has shape \(2, 0, 3\); online_convolution takes at least one step"),
        ((1, 5, 3), (2, 4, 3), 3, r"state.inputs has shape \(2, 4, 3\); x has \(1, 5, 3\)"),
        ((2, 1, 3), (2, 4, 2), 3, r"state.inputs has shape \(2, 4, 2\)"),
        ((2, 5, 3), (2, 4, 3), 2, "taps have 2 channels; x has 3"),
    ],
)
def test_what_does_not_fit_is_named(x, state, taps, message):
    with pytest.raises(ValueError, match=message):
        empty = empty_convolution(state[0], state[1], state[2], jnp.float32)
        online_convolution(jnp.zeros(x), lambda count: jnp.zeros((count, taps)), empty)


@pytest.mark.parametrize(
    "module, message",
    [(BaseConv(4, None, filter_width=0), "filter_width=0; BaseConv"), (Hyena(4, bands=0), "bands=0; Hyena")],
)
def test_too_small_filters_are_named(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), jnp.zeros((1, 5, 4)))
