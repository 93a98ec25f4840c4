"""Independent truth: outputs recorded from flash-linear-attention, its ops and its layers (fla.md).

Not reproduced: fla_ttt_linear, whose state takes a gradient step a mini-batch and is no scan of any monoid here. A
packed call has one state in and one out, so the recorded states of each packed sequence are met by a call each.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, cast
from recorded import load, recorded, with_gradients
from sampled import by_default

from jaxseq import GLA, LanguageModel, ops
from jaxseq.interop import fla_layer
from jaxseq.layers import GatedMLP
from jaxseq.layers.feature_maps import quadratic, taylor
from jaxseq.layers.normalised import normalised_attention
from jaxseq.ops.rescaled import rescaled

# ---- ops: each takes the recorded inputs by their recorded names, and returns what was recorded ---------------------

FORMS = ("sequential", "chunked")  # `parallel` is `sequential`: tests/test_ops.py


class Recorded(NamedTuple):
    op: Callable[..., tuple]
    final: tuple[str, ...] = ("ht",)
    forms: tuple[str, ...] = FORMS


def attention(i, log_decay=None, **options):
    query = i["q"] if "q" in i else i["r"]
    log_decay = i.get("g", log_decay)
    scale = options.pop("scale", i["const_scale"])
    return ops.gated_linear_attention(query, i["k"], i["v"], log_decay, scale=scale, initial_state=i["h0"], **options)


def normalised(i, impl):
    start = jnp.concatenate([i["h0"], i["z0"][:, 0, ..., None]], axis=-1)
    options = dict(scale=i["const_scale"], epsilon=i["const_eps"], initial_state=start, impl=impl)
    o, S = normalised_attention(i["q"], i["k"], i["v"], **options)
    return o, S[..., :-1], S[..., -1][:, None]


def mean_of_features(phi, i, scale, impl):
    options = dict(scale=scale, epsilon=i["const_eps"], impl=impl)
    return normalised_attention(phi(i["q"]), phi(i["k"]), i["v"], **options)[:1]


def state_space_duality(i, impl):
    """Mamba-2's SSD is gated linear attention: query C, key B, value dt x, log decay dt A."""
    dt = jax.nn.softplus(i["dt"] + i["dt_bias"][None, None])
    g, v = -jnp.exp(i["A_log"])[None, None] * dt, dt[..., None] * i["x"]
    o, h = ops.gated_linear_attention(i["C"], i["Bm"], v, g, scale=1.0, initial_state=i["h0"], impl=impl)
    return o + i["D"][None, None, :, None] * i["x"], h


def delta(i, **options):
    options |= {"scale": i["const_scale"], "initial_state": i["h0"]}
    return ops.delta_rule(i["q"], i["k"], i["v"], i["beta"], i.get("g"), **options)


def product(i, impl):
    each = lambda x: x.reshape(x.shape[0], -1, int(i["const_num_householder"]), *x.shape[2:])
    options = dict(scale=i["const_scale"], initial_state=i["h0"], impl=impl)
    return ops.delta_product(i["q"], each(i["k"]), each(i["v"]), each(i["beta"]), i["g"], **options)


def general(i, a, b, **options):
    options |= {"scale": i["const_scale"], "initial_state": i["h0"]}
    decay = next(i[name] for name in ("gk", "w", "g") if (name in i and i[name].shape == a.shape) or name == "g")
    return ops.dplr_recurrence(i["q"] if "q" in i else i["r"], i["k"], i["v"], a, b, decay, **options)


def comba(i, impl):
    scaled = i | {"v": i["beta"][..., None] * i["v"]}
    return general(scaled, i["beta"][..., None] * i["p"], -i["k"], impl=impl)


def gdn2(i, impl):
    """A decayed read: what a reads, decayed."""
    erased = jnp.exp(i["g"]) * i["b"] * i["k"]
    return ops.dplr_recurrence(
        i["q"],
        i["k"],
        i["w"] * i["v"],
        erased,
        -i["k"],
        i["g"],
        scale=i["const_scale"],
        initial_state=i["h0"],
        impl=impl,
    )


def slots(i, s, g, **options):
    before = ops.SlotState(i["hk0"], i["hv0"]) if "hk0" in i else None
    o, state = ops.slot_attention(i["q"], i["k"], i["v"], s, g, scale=i["const_scale"], initial_state=before, **options)
    return o, *state


def bounded_memory(i, impl):
    s, g, *_ = rescaled(None, i["s"], jnp.full_like(i["s"][:, :1], -jnp.inf))
    return slots(i, s, g, impl=impl)[:1]


def least_squares(i, impl):
    o, state = ops.mesa(i["q"], i["k"], i["v"], i["beta"], i["g"], i["lamb"], impl=impl)
    return o, *state


def forgetting(i, impl):
    options = dict(scale=i["const_scale"], chunk_size=8, impl=impl)
    return (ops.softmax_attention(i["q"], i["k"], i["v"], log_decay=i["g"], **options),)


def along_a_path(i, impl):
    """They scale the gates with the logits."""
    options = dict(log_decay=i["const_scale"] * i["g"], scale=i["const_scale"], chunk_size=8, impl=impl)
    return (ops.path_attention(i["q"], i["k"], i["v"], i["w"], i["beta"], **options),)


def runs_of_tokens(i, impl):
    options = dict(scale=i["const_scale"], chunk_size=8, impl=impl)
    return ops.log_linear_attention(i["q"], i["k"], i["v"], i["level_scales"], i["g"], **options)[:1]


def elementwise(i, impl):
    return ops.linear_recurrence(jnp.exp(i["g"]), i["x"], initial_state=i["h0"], impl=impl)


OPS = {
    "fla_gla": Recorded(attention),
    "fla_simple_gla": Recorded(attention),
    "fla_retention": Recorded(lambda i, impl: attention(i, i["const_log_gamma"], impl=impl)),
    "fla_lightning": Recorded(lambda i, impl: attention(i, i["const_log_gamma"], impl=impl)),
    "fla_linear_attn": Recorded(attention),
    "fla_linear_attn_norm": Recorded(normalised, ("ht", "zt")),
    "fla_based": Recorded(lambda i, impl: mean_of_features(taylor, i, 1.0, impl), ()),
    "fla_rebased": Recorded(lambda i, impl: mean_of_features(quadratic, i, i["const_scale"] ** 2, impl), ()),
    "fla_rwkv6": Recorded(lambda i, impl: attention(i, i["w"], bonus=i["u"], impl=impl)),
    "fla_mamba2_ssd": Recorded(state_space_duality),
    "fla_hgrn": Recorded(elementwise, forms=(*FORMS, "in_place")),
    "fla_delta_rule": Recorded(delta),
    "fla_gated_delta_rule": Recorded(delta),
    "fla_kda": Recorded(delta),
    "fla_gated_delta_product": Recorded(product),
    "fla_gdn2": Recorded(gdn2),
    "fla_comba": Recorded(comba),
    "fla_rwkv7": Recorded(lambda i, impl: general(i, -i["kk"], i["kk"] * i["a"], impl=impl)),
    "fla_gsa": Recorded(lambda i, impl: slots(i, i["s"], i["g"], impl=impl), ("hkt", "hvt")),
    "fla_abc": Recorded(bounded_memory, ()),
    "fla_forgetting_attn": Recorded(forgetting, (), (*FORMS, "parallel")),
    "fla_path_attn": Recorded(along_a_path, (), (*FORMS, "parallel")),
    "fla_log_linear_attn": Recorded(runs_of_tokens, (), (*FORMS, "parallel")),
    "fla_mesa_net": Recorded(least_squares, ("hkk_t", "hkv_t")),
    "fla_dplr": Recorded(lambda i, impl: general(i, i["alpha"], i["beta"], impl=impl)),
}
#: In float32 the gradient of A_log, a sum over all tokens, loses more.
LONG_SUMS = {"fla_mamba2_ssd": 2e-5}
#: Their other words for ops that are met here by default.
SAME = (
    "fla_lightning", "fla_linear_attn", "fla_mamba2_ssd", "fla_delta_rule", "fla_gated_delta_rule",
    "fla_gdn2", "fla_comba", "fla_dplr",
)  # fmt: skip
#: By default the chunks in float64; other forms, and float32, are those of tests/test_ops.py.
PRECISIONS = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in SAME or case[1:] != ("chunked", "float64")))
    for case in ((f, form, dtype) for f, op in OPS.items() for form in op.forms for dtype in ("float64", "float32"))
]


@recorded
@pytest.mark.parametrize("file, impl, precision", PRECISIONS)
def test_op(file, impl, precision):
    """Values, final states, and the gradient of every input."""
    z, case = load(file), OPS[file]
    constant = {name: a for name, a in z.items() if name.startswith("const_")}
    inputs = {name: a for name, a in z.items() if f"grad_{name}" in z}
    names = ("o", *case.final)
    expected = tuple(z[name] for name in names), {name: z[f"grad_{name}"] for name in inputs}
    with jax.enable_x64(precision == "float64"):
        dtype = jnp.dtype(precision)
        numbers = {name: float(a) if a.ndim == 0 else cast(a, dtype) for name, a in constant.items()}
        op = lambda i: case.op(i | numbers, impl=impl)
        cotangents = cast(tuple(z[f"d{name}"] for name in names), dtype)
        bound = 1e-12 if precision == "float64" else LONG_SUMS.get(file, 2e-6)
        assert_close(with_gradients(op, cast(inputs, dtype), cotangents), expected, bound)


PACKED = {
    "fla_gla_packed": ops.gated_linear_attention,
    "fla_simple_gla_packed": ops.gated_linear_attention,
    "fla_gated_delta_rule_packed": ops.delta_rule,
    "fla_hgrn_packed": lambda decay, inputs, **options: ops.linear_recurrence(jnp.exp(decay), inputs, **options),
}


@recorded
@pytest.mark.parametrize("file", by_default(["fla_gated_delta_rule_packed"], PACKED))
def test_packed(file):
    """One by one, each from its own state; and in one call with segment ids, from zero after the first."""
    z = load(file)
    names = dict(query="q", key="k", value="v", log_decay="g") | ({"beta": "beta"} if "beta" in z else {})
    names = names if "q" in z else {"decay": "g", "inputs": "x"}
    cuts = list(zip(z["cu_seqlens"][:-1].tolist(), z["cu_seqlens"][1:].tolist(), strict=True))
    ids = jnp.asarray(np.repeat(np.arange(len(cuts)), np.diff(z["cu_seqlens"])))[None]
    op = partial(PACKED[file], scale=float(z["const_scale"]), chunk_size=16) if "q" in z else PACKED[file]

    def one_by_one(inputs):
        part = lambda a, b: {ours: inputs[theirs][:, a:b] for ours, theirs in names.items()}
        runs = [op(**part(a, b), initial_state=inputs["h0"][i : i + 1]) for i, (a, b) in enumerate(cuts)]
        outputs, states = zip(*runs, strict=True)
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(states)

    with jax.enable_x64(True):
        inputs, cotangents = cast(({n: z[n] for n in (*names.values(), "h0")}, (z["do"], z["dht"])), jnp.float64)
        expected = (z["o"], z["ht"]), {n: z[f"grad_{n}"] for n in inputs}
        apart = jax.jit(partial(with_gradients, one_by_one))
        assert_close(apart(inputs, cotangents), expected, 1e-12)
        together = lambda i: op(**{a: i[b] for a, b in names.items()}, initial_state=i["h0"][:1], segment_ids=ids)
        outputs, slopes = with_gradients(together, inputs, (cotangents[0], cotangents[1][3:]))
        first_only = inputs | {"h0": inputs["h0"].at[1:].set(0)}
        alone, own = apart(first_only, (cotangents[0], cotangents[1].at[:3].set(0)))
        slopes, own = (g | {"h0": g["h0"][:1]} for g in (slopes, own))  # the other states are not given
        assert_close((outputs[0], outputs[1], slopes), (alone[0], alone[1][3:], own), 1e-12)


# ---- layers and the model ------------------------------------------------------------------------------------------

#: file → their class, the fields that weights do not tell
LAYERS = {
    "fla_layer_gla": ("GatedLinearAttention", dict(num_heads=2)),
    "fla_layer_gla_conv_gqa": (
        "GatedLinearAttention", dict(num_heads=4, num_kv_heads=2, expand_k=1.0, expand_v=2.0, conv_window=4),
    ),
    "fla_layer_simple_gla": ("SimpleGatedLinearAttention", dict(num_heads=2, expand_k=1.0, conv_window=4)),
    "fla_layer_mamba": ("Mamba", dict(state_size=8)),
    "fla_layer_mamba2": ("Mamba2", dict(num_heads=4, state_size=12)),
    "fla_layer_delta_net": ("DeltaNet", dict(num_heads=2)),
    "fla_layer_gated_deltanet": ("GatedDeltaNet", dict(num_heads=2, expand_k=1.0, expand_v=2.0)),
    "fla_layer_gated_deltaproduct": ("GatedDeltaProduct", dict(num_heads=2, expand_k=1.0, expand_v=1.0)),
    "fla_layer_comba": ("Comba", dict(num_heads=2)),
    "fla_layer_lightnet": ("LightNetAttention", dict(num_heads=2, gate_rank=8)),
    "fla_layer_gdn2": ("GatedDeltaNet2", dict(num_heads=2)),
    "fla_layer_rodimus": ("RodimusAttention", dict(key_width=16, gate_rank=4)),
    "fla_layer_kda": ("KimiDeltaAttention", dict(num_heads=2)),
    "fla_layer_linear_attn": ("LinearAttention", dict(num_heads=2, norm_eps=1e-5)),
    "fla_layer_rebased": ("ReBasedLinearAttention", dict(num_heads=2)),
    "fla_layer_hgrn": ("HGRNAttention", {}),
    "fla_layer_hgrn2": ("HGRN2Attention", dict(num_heads=2)),
    "fla_layer_retnet": ("MultiScaleRetention", dict(num_heads=2)),
    "fla_layer_gsa": ("GatedSlotAttention", dict(num_heads=2, num_slots=8)),
    "fla_layer_rwkv6": ("RWKV6Attention", dict(num_heads=2, expand_k=0.5, mix_rank=4, decay_rank=8)),
    "fla_layer_rwkv7": (
        "RWKV7Attention", dict(num_heads=2, decay_rank=8, a_rank=8, value_rank=8, gate_rank=8),
    ),
}  # fmt: skip

COMMON = ("fla_layer_gla", "fla_layer_rwkv7", "fla_layer_mamba2")

#: Fields that are recorded beside the weights, and inputs beside x.
GIVEN, BESIDE = ("lower_bound",), {"v_first": "first_value"}


def under(z, prefix):
    return {name.removeprefix(prefix): a for name, a in z.items() if name.startswith(prefix)}


@recorded
@pytest.mark.parametrize("file", by_default(COMMON, LAYERS))
def test_layer(file):
    """Their module's output and gradients, whole and as prefill and steps. The bounds are theirs against float64."""
    (layer, fields), z = LAYERS[file], load(file)
    fields = fields | {name: tuple(z[name].tolist()) for name in GIVEN if name in z}
    (module, params), x = fla_layer(layer, under(z, "w."), **fields), jnp.asarray(z["x"])
    beside = {ours: jnp.asarray(z[theirs]) for theirs, ours in BESIDE.items() if theirs in z}
    y, (d_params, d_x) = with_gradients(lambda p: module.apply(*p, **beside), (params, x), jnp.asarray(z["dy"]))
    assert_close(y, z["y"], 2e-6)
    if "grad_x" in z:  # their Gated DeltaProduct has no backward pass on CPU
        assert_close(d_x, z["grad_x"], 4e-6)
        assert_close(d_params, fla_layer(layer, under(z, "grad_w."), **fields)[1], 5e-5)
    length = x.shape[1]

    def decode(params, x):
        start, end = (jax.tree.map(lambda a, s=s: a[:, s], (x, beside)) for s in (slice(-6), slice(length - 6, None)))
        first, state = module.apply(params, start[0], module.init_state(2), method="prefill", **start[1])
        step = lambda state, now: module.apply(params, now[0], state, method="step", **now[1])[::-1]
        rest = jax.lax.scan(step, state, jax.tree.map(lambda a: a.swapaxes(0, 1), end))[1].swapaxes(0, 1)
        return jnp.concatenate([first, rest], axis=1)

    assert_close(jax.jit(decode)(params, x), z["y"], 2e-6)


@recorded
def test_weights_that_do_not_fit_are_named():
    weights = under(load("fla_layer_gla"), "w.")
    fit = lambda weights, **fields: fla_layer("GatedLinearAttention", weights, **{"num_heads": 2} | fields)
    without = {name: a for name, a in weights.items() if name != "k_proj.weight"}
    with pytest.raises(ValueError, match="no weights of GLA: rotary is unknown; k_proj.weight is missing"):
        fit(without | {"rotary": np.zeros(3)})
    with pytest.raises(ValueError, match=r"k_proj.weight is \(32, 16\) and should be \(32, 32\); q_proj.weight is"):
        fit(weights, expand_k=1.0)
    with pytest.raises(ValueError, match="GatedLinearAttention misses o_proj.weight"):
        fit({})
    with pytest.raises(NotImplementedError, match="layer='GLA' has no mixer here; choose one of GatedLinear"):
        fla_layer("GLA", weights)


def model_params(z, prefix):
    def layer(i):
        named = under(z, f"{prefix}model.layers.{i}.")
        _, mixer = fla_layer("GatedLinearAttention", under(named, "attn."), num_heads=2)
        return {
            "mixer": mixer["params"],
            "mlp": {
                f"{n}_proj": {"kernel": jnp.asarray(named[f"mlp.{n}_proj.weight"].T)} for n in ("gate", "up", "down")
            },
        } | {
            f"{n}_norm": {"scale": jnp.asarray(named[f"{theirs}_norm.weight"])}
            for n, theirs in (("mixer", "attn"), ("mlp", "mlp"))
        }

    layers = [layer(i) for i in range(2)]
    return {
        "params": {
            "Embed_0": {"embedding": jnp.asarray(z[f"{prefix}model.embeddings.weight"])},
            "stack": {
                "layers": {"block_0": jax.tree.map(lambda *x: jnp.stack(x), *layers)},
                "norm": {"scale": jnp.asarray(z[f"{prefix}model.norm.weight"])},
            },
            "head": {"kernel": jnp.asarray(z[f"{prefix}lm_head.weight"].T)},
        }
    }


@recorded
def test_language_model():
    """Logits, loss, all gradients, and the tokens that greedy decoding picks from prefill and steps."""
    z = load("fla_model_gla")
    mixer = partial(GLA, num_heads=2, norm_eps=1e-6)
    model = LanguageModel(64, 32, (mixer,) * 2, mlp=partial(GatedMLP, hidden=64))
    params, tokens = model_params(z, "w."), jnp.asarray(z["input_ids"])

    def loss(params):
        logits = model.apply(params, tokens)
        log_probability = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probability, tokens[:, 1:, None], axis=-1).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(logits, z["logits"], 2e-6)
    assert_close(value, z["loss"], 1e-6)
    assert_close(gradients, model_params(z, "grad_w."), 5e-5)

    @jax.jit
    def greedy(params, prompt):
        logits, state = model.apply(params, prompt, model.init_state(2), method="prefill")
        pick = lambda logits: jnp.argmax(logits, -1).astype(jnp.int32)

        def step(carry, _):
            token, state = carry
            logits, state = model.apply(params, token, state, method="step")
            return (pick(logits), state), token

        return jax.lax.scan(step, (pick(logits[:, -1]), state), length=12)[1].T

    np.testing.assert_array_equal(greedy(params, tokens[:, : int(z["greedy_prompt_len"])]), z["greedy_tokens"])
