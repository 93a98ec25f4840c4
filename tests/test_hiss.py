"""Two levels of sequence models: against recorded outputs, in parts and by samples, and beside a flat model."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params
from recorded import load, recorded
from sampled import by_default

from jaxseq.layers.gated_output import gated_output
from jaxseq.layers.mixer import Mixer
from jaxseq.layers.mlp import MLP
from jaxseq.mixers import GLA, LSTM, S4D, Attention
from jaxseq.models import FlatRegressor, HiSS, Stack
from jaxseq.models.block import Block
from jaxseq.ops import long_convolution

STACK = partial(Stack, mixers=(partial(S4D, state_size=8),) * 2, mlp=None, norm="layer")


def built(low, high, **fields):
    module = HiSS(2, chunk=5, d_model=8, low=low, high=high, **{"low_width": 4} | fields)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 35, 6)), jnp.float32)
    return module, random_params(module, x), x


class TwoLSTMs(Mixer):
    d_model: int
    dtype: type | None = None
    param_dtype: type = jnp.float32

    def setup(self):
        self.layers = [LSTM(self.d_model) for _ in range(2)]

    def prefill(self, x, state, segment_ids=None):
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer.prefill(x, before, segment_ids)
            after.append(last)
        return x, tuple(after)

    def init_state(self, batch_size, *, max_length=None, dtype=jnp.float32):
        return (LSTM(self.d_model, parent=None).init_state(batch_size, dtype=dtype),) * 2


class Level(nn.Module):
    """Two blocks without a norm after them, at positions that are added first: the authors' levels."""

    d_model: int
    mixer: Callable
    mlp: Callable | None = None
    places: int = 0
    dtype: type | None = None
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, state):
        if self.places:
            x = x + self.param("places", nn.initializers.zeros, (self.places, self.d_model))[None]
        block = partial(Block, self.d_model, self.mixer, self.mlp, "layer", 1e-5, True, 0.0)
        for n in range(2):
            x, *_ = block(self.dtype, self.param_dtype, name=f"block_{n}")(x, None)
        return x, state


class GivenKernel(nn.Module):
    """A layer of S4 whose kernel is a parameter."""

    d_model: int
    dtype: type | None = None
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, segment_ids):
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[1], self.d_model))
        skip = self.param("D", nn.initializers.zeros, (self.d_model,))
        return gated_output(self, long_convolution(x, kernel) + skip[None, None] * x, approximate=False)


class CausalAttention(nn.Module):
    d_model: int
    dtype: type | None = None
    param_dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, segment_ids):
        return nn.MultiHeadDotProductAttention(2, name="heads")(x, mask=nn.make_causal_mask(x[..., 0]))


class Authors:
    """Recorded parameters of one of their models, by their names, as ours."""

    def __init__(self, model):
        self._get = lambda name: np.asarray(load("hiss")[f"{model}.{name}"], np.float64)

    def __call__(self, name):
        return self._get(f"p.{name}")

    def dense(self, name):
        weight = self(f"{name}.weight")
        return {"kernel": weight.reshape(weight.shape[:2]).T, "bias": self(f"{name}.bias")}

    def norm(self, name):
        return {"scale": self(f"{name}.weight"), "bias": self(f"{name}.bias")}

    def lstm(self, level, layer=0):
        return {
            "in_proj": {
                "kernel": self(f"{level}.lstm.weight_ih_l{layer}").T,
                "bias": self(f"{level}.lstm.bias_ih_l{layer}") + self(f"{level}.lstm.bias_hh_l{layer}"),
            },
            "recurrent_kernel": self(f"{level}.lstm.weight_hh_l{layer}").T,
        }

    def s4(self, level, layer):
        name = f"{level}.s4_layers.{layer}"
        return {
            "mixer_norm": self.norm(f"{level}.norms.{layer}"),
            "mixer": {
                "kernel": self._get(f"kernel.{name}.layer.kernel").T,
                "D": self(f"{name}.layer.D")[0],
                "out_proj": self.dense(f"{name}.output_linear.0"),
            },
        }

    def transformer(self, layer):
        name = f"high_level.layers.{layer}"
        each = zip(*(np.split(self(f"{name}.self_attn.in_proj_{what}"), 3) for what in ("weight", "bias")), strict=True)
        heads = {
            which: {"kernel": weight.T.reshape(-1, 2, weight.shape[0] // 2), "bias": bias.reshape(2, -1)}
            for which, (weight, bias) in zip(("query", "key", "value"), each, strict=True)
        }
        out = self.dense(f"{name}.self_attn.out_proj")
        out["kernel"] = out["kernel"].reshape(2, -1, out["kernel"].shape[1])
        return {
            "mixer_norm": self.norm(f"{name}.norm1"),
            "mixer": {"heads": {**heads, "out": out}},
            "mlp_norm": self.norm(f"{name}.norm2"),
            "mlp": {"up_proj": self.dense(f"{name}.linear1"), "down_proj": self.dense(f"{name}.linear2")},
        }


def assert_authors(model, low, high, params):
    """Outputs of HiSS with the two slots, to 1e-5."""
    z, of = load("hiss"), Authors(model)
    params = {"embed": of.dense("low_level.embed"), "feature": of.dense("low_level.decoder")} | params(of)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    module = HiSS(2, int(z["cfg.chunk"]), 8, None, low, high)
    y = jax.jit(module.apply)({"params": {"head": of.dense("output")} | params}, jnp.asarray(z["x"]))
    np.testing.assert_allclose(y, z[f"{model}.y"], atol=1e-5)


@recorded
def test_lstm_over_lstm_is_the_authors():
    """Their high level has linear maps of its own: the first is one with ours behind the low level."""
    after = lambda first, second: {
        "kernel": first["kernel"] @ second["kernel"], "bias": first["bias"] @ second["kernel"] + second["bias"],
    }  # fmt: skip
    params = lambda of: {
        "low_model": of.lstm("low_level"),
        "feature": after(of.dense("low_level.decoder"), of.dense("high_level.embed")),
        "high_model": {f"layers_{n}": of.lstm("high_level", n) for n in range(2)},
        "head": after(of.dense("high_level.decoder"), of.dense("output")),
    }
    assert_authors("lstm", LSTM, TwoLSTMs, params)


@recorded
def test_s4_over_s4_is_the_authors():
    params = lambda of: {
        f"{level}_model": {f"block_{n}": of.s4(f"{level}_level", n) for n in range(2)} for level in ("low", "high")
    }
    level = partial(Level, mixer=GivenKernel)
    assert_authors("s4", level, level, params)


@recorded
def test_a_transformer_over_lstm_is_the_authors():
    params = lambda of: {
        "low_model": of.lstm("low_level"),
        "high_model": {"places": load("hiss")["tr.pe"], **{f"block_{n}": of.transformer(n) for n in range(2)}},
    }
    high = partial(Level, mixer=CausalAttention, mlp=partial(MLP, hidden=16, activation=nn.relu), places=6)
    assert_authors("tr", LSTM, high, params)


@pytest.mark.parametrize(
    "low, high",
    by_default([(LSTM, GLA)], [(STACK, STACK), (LSTM, GLA), (partial(Attention, num_heads=2), STACK)]),
    ids=str,
)
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


def test_a_part_that_starts_inside_a_chunk_is_refused():
    """Where the position is known; a whole chunk later it goes on."""
    module, params, x = built(LSTM, LSTM)
    state, step = module.init_state(3), jax.jit(partial(module.apply, method="step"))
    for t in range(5):
        if t == 2:
            with pytest.raises(ValueError, match="state.position=2; HiSS.prefill goes on from 0, at the border"):
                module.apply(params, x[:, :5], state, method="prefill")
        *_, state = step(params, x[:, t], state)
    assert module.apply(params, x[:, 5:], state, method="prefill")[0].shape == (3, 6, 2)


def test_other_channels_than_the_parameters_are_for_are_named():
    module, params, x = built(LSTM, LSTM)
    flat = FlatRegressor(2, 5, 8, LSTM)
    for model, known, owner in (
        (module, params, "HiSS"),
        (flat, jax.eval_shape(flat.init, jax.random.key(0), x), "FlatRegressor"),
    ):
        with pytest.raises(ValueError, match=f"x has 4 channels; the parameters of this {owner} are for 6"):
            jax.eval_shape(model.apply, known, x[..., :4])
    with pytest.raises(ValueError, match="x has 4 channels; the parameters of this HiSS are for 6"):
        module.apply(params, x[:, 0, :4], module.init_state(3), method="step")
    with pytest.raises(ValueError, match=r"state.low has shape \(2, .*\); a step of x \(3, 6\) takes \(3, "):
        module.apply(params, x[:, 0], module.init_state(2), method="step")


def test_a_number_that_is_missing_is_named():
    """Outside `jit`, in every call."""
    module, params, x = built(LSTM, LSTM)
    x, state, flat = x.at[1, 2, 3].set(jnp.nan), module.init_state(3), FlatRegressor(2, 5, 8, LSTM)
    for owner, call in (
        ("HiSS", lambda: module.apply(params, x)),
        ("HiSS", lambda: module.apply(params, x, state, method="prefill")),
        ("FlatRegressor", lambda: flat.init(jax.random.key(0), x)),
    ):
        with pytest.raises(ValueError, match=rf"x is nan at \[1, 2, 3\]; {owner} takes finite numbers"):
            call()
    with pytest.raises(ValueError, match=r"x is nan at \[1, 3\]; HiSS takes finite numbers"):
        module.apply(params, x[:, 2], state, method="step")


def test_an_output_sees_its_chunk_and_what_came_before():
    module, _, x = built(STACK, STACK)
    params = jax.jit(module.init)(jax.random.key(0), x)  # they remember for long at the start
    seen = jax.jit(jax.grad(lambda x: module.apply(params, x)[0, 3].sum()))(x)[0]
    assert (np.abs(seen[:20]).max(axis=1) > 1e-5).all() and np.abs(seen[20:]).max() < 1e-7


@pytest.mark.parametrize("readout, sees", [("last", 20), ("first", 16)])
def test_what_the_flat_model_sees(readout, sees):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 35, 6)), jnp.float32)
    module = FlatRegressor(2, 5, 8, STACK, readout)
    params = jax.jit(module.init)(jax.random.key(0), x)
    seen = jax.jit(jax.grad(lambda x: module.apply(params, x)[0, 3].sum()))(x)[0]
    assert (np.abs(seen[:sees]).max(axis=1) > 1e-5).all() and np.abs(seen[sees:]).max() < 1e-7


def test_bfloat16_is_near_float32():
    module, params, x = built(STACK, STACK)
    exact, half = jax.jit(module.apply)(params, x), HiSS(2, 5, 8, 4, STACK, STACK, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        rough = jax.jit(half.apply)(params, x.astype(jnp.bfloat16))
    assert_close(rough.astype(jnp.float32), exact, 0.1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: HiSS(2, chunk=4, low=STACK, high=STACK), "35 samples; HiSS\\(chunk=4\\) takes whole chunks"),
        (lambda x: HiSS(2, chunk=0, low=STACK, high=STACK), "chunk=0; HiSS takes 1 or more"),
        (lambda x: HiSS(0, low=STACK, high=STACK), "outputs=0; HiSS takes 1 or more"),
        (lambda x: HiSS(2, low_width=0, low=STACK, high=STACK), "low_width=0; HiSS takes 1 or more"),
        (lambda x: FlatRegressor(2, chunk=0, model=STACK), "chunk=0; FlatRegressor takes 1 or more"),
        (lambda x: FlatRegressor(2, chunk=4, model=STACK), "FlatRegressor\\(chunk=4\\) takes whole"),
        (lambda x: FlatRegressor(2, chunk=5, model=STACK, readout="mean"), "readout='mean'; choose one of last, first"),
    ],
)
def test_wrong_input_is_named(call, message):
    x = jnp.zeros((1, 35, 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call(x).init, jax.random.key(0), x)


@pytest.mark.parametrize("model", [HiSS(2, low=LSTM, high=LSTM), FlatRegressor(2, model=LSTM)])
def test_nothing_to_read_is_named(model):
    with pytest.raises(ValueError, match=f"x has 0 steps of 3 variates; {type(model).__name__} takes 1 or more"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 0, 3)))
