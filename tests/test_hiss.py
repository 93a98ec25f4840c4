"""Two levels of sequence models: against recorded outputs, in parts and by samples, and beside a flat model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close
from recorded import load, recorded

from jaxseq.layers.mixer import Mixer
from jaxseq.mixers import GLA, LSTM, S4D, Attention
from jaxseq.models import FlatRegressor, HiSS, Stack

STACK = partial(Stack, mixers=(partial(S4D, state_size=8),) * 2, mlp=None, norm="layer")


def built(low, high, **fields):
    module = HiSS(2, chunk=5, d_model=8, low=low, high=high, **{"low_width": 4} | fields)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 35, 6)), jnp.float32)
    return module, module.init(jax.random.key(0), x), x


class TwoLSTMs(Mixer):
    d_model: int
    dtype: type | None = None
    param_dtype: type = jnp.float32

    def setup(self):
        self.layers = [LSTM(self.d_model, forget_bias=0.0) for _ in range(2)]

    def prefill(self, x, state, segment_ids=None):
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer.prefill(x, before, segment_ids)
            after.append(last)
        return x, tuple(after)

    def init_state(self, batch_size, *, max_length=None, dtype=jnp.float32):
        return (LSTM(self.d_model, parent=None).init_state(batch_size, dtype=dtype),) * 2


@recorded
def test_lstm_over_lstm_is_the_authors():
    """Their high level has linear maps of its own: the first is one with ours behind the low level."""
    z = load("hiss")
    get = lambda name: np.asarray(z[f"lstm.p.{name}"], np.float64)
    dense = lambda name: {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}
    after = lambda first, second: {
        "kernel": first["kernel"] @ second["kernel"], "bias": first["bias"] @ second["kernel"] + second["bias"],
    }  # fmt: skip
    lstm = lambda level, layer: {
        "in_proj": {
            "kernel": get(f"{level}.lstm.weight_ih_l{layer}").T,
            "bias": get(f"{level}.lstm.bias_ih_l{layer}") + get(f"{level}.lstm.bias_hh_l{layer}"),
        },
        "recurrent_kernel": get(f"{level}.lstm.weight_hh_l{layer}").T,
    }
    params = {
        "embed": dense("low_level.embed"),
        "low_model": lstm("low_level", 0),
        "feature": after(dense("low_level.decoder"), dense("high_level.embed")),
        "high_model": {f"layers_{n}": lstm("high_level", n) for n in range(2)},
        "head": after(dense("high_level.decoder"), dense("output")),
    }
    module = HiSS(2, int(z["cfg.chunk"]), 8, None, partial(LSTM, forget_bias=0.0), TwoLSTMs)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    y = jax.jit(module.apply)({"params": params}, jnp.asarray(z["x"]))
    np.testing.assert_allclose(y, z["lstm.y"], atol=1e-5)


@pytest.mark.parametrize("low, high", [(STACK, STACK), (LSTM, GLA), (partial(Attention, num_heads=2), STACK)], ids=str)
def test_whole_in_parts_and_by_samples(low, high):
    module, params, x = built(low, high)
    whole = jax.jit(module.apply)(params, x)
    assert whole.shape == (3, 7, 2)
    state = module.init_state(3, max_length=7)
    prefill = jax.jit(partial(module.apply, method="prefill"))
    first, state = prefill(params, x[:, :20], state)
    step = jax.jit(partial(module.apply, method="step"))
    rest = []
    for t in range(20, 35):
        y, done, state = step(params, x[:, t], state)
        assert bool(done) == (t % 5 == 4)
        rest += [y] * bool(done)
        assert bool(done) or not y.any()
    assert_close(jnp.concatenate([first, jnp.stack(rest, axis=1)], axis=1), whole, "float32 strong")


def test_an_output_sees_its_chunk_and_what_came_before():
    module, params, x = built(STACK, STACK)
    seen = jax.jacobian(lambda x: module.apply(params, x)[0, 3].sum())(x)[0]
    assert (np.abs(seen[:20]).max(axis=1) > 1e-5).all() and np.abs(seen[20:]).max() < 1e-7


@pytest.mark.parametrize("readout, sees", [("last", 20), ("first", 16)])
def test_what_the_flat_model_sees(readout, sees):
    _, _, x = built(STACK, STACK)
    module = FlatRegressor(2, 5, 8, STACK, readout)
    params = module.init(jax.random.key(0), x)
    seen = jax.jacobian(lambda x: module.apply(params, x)[0, 3].sum())(x)[0]
    assert (np.abs(seen[:sees]).max(axis=1) > 1e-5).all() and np.abs(seen[sees:]).max() < 1e-7


def test_bfloat16_is_near_float32():
    module, params, x = built(STACK, STACK)
    exact = module.apply(params, x)
    with jax.numpy_dtype_promotion("standard"):
        rough = HiSS(2, 5, 8, 4, STACK, STACK, dtype=jnp.bfloat16).apply(params, x.astype(jnp.bfloat16))
    assert_close(rough.astype(jnp.float32), exact, 0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: HiSS(2, chunk=4, low=STACK, high=STACK), "35 samples; HiSS\\(chunk=4\\) takes whole chunks"),
        (lambda x: HiSS(2, chunk=0, low=STACK, high=STACK), "chunk=0"),
        (lambda x: FlatRegressor(2, chunk=4, model=STACK), "FlatRegressor\\(chunk=4\\) takes whole"),
        (lambda x: FlatRegressor(2, chunk=5, model=STACK, readout="mean"), "readout='mean'; choose one of last, first"),
    ],
)
def test_wrong_input_is_named(call, message):
    x = jnp.zeros((1, 35, 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call(x).init, jax.random.key(0), x)
