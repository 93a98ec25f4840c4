"""Independent truth: outputs recorded from the authors' own code.

They lie beside the repository, in `../shared/reference`; without them those tests are skipped. Covered:
- fla.md: gla, simple_gla, retention, lightning, linear_attn, rwkv6, mamba2_ssd, hgrn (ops); gla_packed,
  simple_gla_packed; layer_gla, layer_gla_conv_gqa, layer_mamba; model_gla.
- seeds-models.md: hmm_glm.
- ssm.md: mamba_ops (all but rmsnorm_gated_*); s4_kernels s4d_* and hippo_legs_*; s4_layers s4d_layer_*.
- models.md: chimera_2dssm.
Waiting for the work that builds what they check: rmsnorm_gated_* (Mamba-2's norm); S4's own kernels, DSS and the
bidirectional blocks (s4_*, dss_*, s4_block_*); s5_lru; hf_mamba*; every other fla_* file (its op or layer).
"""

import json
from functools import cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, cast, quick_jit
from flax import traverse_util

from jaxseq import GLA, S4D, LanguageModel, Mamba, ops
from jaxseq.layers import GatedMLP
from jaxseq.layers.initialisers import hippo_legs, legs_diagonal
from jaxseq.models import gumbel_softmax_log_density
from jaxseq.ops.state_space import DISCRETISATIONS

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
recorded = pytest.mark.skipif(not REFERENCE.exists(), reason="the recorded outputs are not beside the repository")
GLA_FORMS = ("sequential", "parallel", "chunked")


@cache
def load(file, group=None):
    """The arrays of a file, or of one group of it."""
    if not REFERENCE.exists():
        return {}
    arrays = dict(np.load(REFERENCE / f"{file}.npz"))
    return arrays if group is None else {k.split("/", 1)[1]: a for k, a in arrays.items() if k.startswith(f"{group}/")}


def groups(file, prefix):
    names = (
        []
        if not REFERENCE.exists()
        else {k.split("/")[0] for k in np.load(REFERENCE / f"{file}.npz").files if "/" in k}
    )
    return sorted(name for name in names if name.startswith(prefix)) or [prefix]


def assert_near(actual, expected, bound):
    """The measure of ssm.md: the largest error over the largest value, array by array."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()
        assert error <= bound, f"{jax.tree_util.keystr(path)}: error {error:.2e} exceeds {bound:.0e}"


def with_gradients(function, inputs, cotangents):
    """Values and the gradients of every input, jitted."""

    def both(inputs, cotangents):
        values, pull = jax.vjp(function, inputs)
        return values, pull(cotangents)[0]

    return quick_jit(both)(inputs, cotangents)


# ---- linear attention ops ------------------------------------------------------------------------------------------

#: file → our argument for each recorded input
LINEAR = {
    "fla_gla": dict(query="q", key="k", value="v", log_decay="g"),
    "fla_simple_gla": dict(query="q", key="k", value="v", log_decay="g"),
    "fla_retention": dict(query="q", key="k", value="v", log_decay="const_log_gamma"),
    "fla_lightning": dict(query="q", key="k", value="v", log_decay="const_log_gamma"),
    "fla_linear_attn": dict(query="q", key="k", value="v"),
    "fla_rwkv6": dict(query="r", key="k", value="v", log_decay="w", bonus="u"),
}


@recorded
@pytest.mark.parametrize("impl", GLA_FORMS)
@pytest.mark.parametrize("file", LINEAR)
def test_linear_attention(file, impl):
    z, names = load(file), LINEAR[file] | {"initial_state": "h0"}
    constant = {ours: z[theirs] for ours, theirs in names.items() if theirs.startswith("const")}
    inputs = {ours: z[theirs] for ours, theirs in names.items() if ours not in constant}
    expected = (z["o"], z["ht"]), {ours: z[f"grad_{names[ours]}"] for ours in inputs}
    precisions = [("float64", jnp.float64, 1e-12)] + [("float32", jnp.float32, 2e-6)] * (file == "fla_gla")
    for name, dtype, bound in precisions:
        with jax.enable_x64(name == "float64"):
            op = lambda x, dtype=dtype: ops.gated_linear_attention(
                **x, **cast(constant, dtype), scale=float(z["const_scale"]), chunk_size=16, impl=impl
            )
            assert_close(with_gradients(op, cast(inputs, dtype), cast((z["do"], z["dht"]), dtype)), expected, bound)


@recorded
@pytest.mark.parametrize("impl", ["sequential", "parallel", "chunked", "in_place"])
def test_elementwise_recurrence(impl):
    z = load("fla_hgrn")
    names = ("x", "g", "h0")
    op = lambda i: ops.linear_recurrence(jnp.exp(i["g"]), i["x"], initial_state=i["h0"], impl=impl)
    with jax.enable_x64(True):
        inputs, cotangents = cast(({n: z[n] for n in names}, (z["do"], z["dht"])), jnp.float64)
        expected = (z["o"], z["ht"]), {n: z[f"grad_{n}"] for n in names}
        assert_close(with_gradients(op, inputs, cotangents), expected, 1e-12)


@recorded
def test_state_space_duality():
    """Mamba-2's SSD is gated linear attention: query C, key B, value dt x, log decay dt A."""
    z = load("fla_mamba2_ssd")
    names = ("x", "dt", "dt_bias", "A_log", "Bm", "C", "D", "h0")

    def ssd(i):
        dt = jax.nn.softplus(i["dt"] + i["dt_bias"][None, None])
        g, v = -jnp.exp(i["A_log"])[None, None] * dt, dt[..., None] * i["x"]
        o, h = ops.gated_linear_attention(i["C"], i["Bm"], v, g, scale=1.0, initial_state=i["h0"], chunk_size=16)
        return o + i["D"][None, None, :, None] * i["x"], h

    with jax.enable_x64(True):
        actual = with_gradients(
            ssd, cast({n: z[n] for n in names}, jnp.float64), cast((z["do"], z["dht"]), jnp.float64)
        )
        assert_close(actual, ((z["o"], z["ht"]), {n: z[f"grad_{n}"] for n in names}), 1e-12)


@recorded
@pytest.mark.parametrize("file", ["fla_gla_packed", "fla_simple_gla_packed"])
def test_packed_linear_attention(file):
    """One by one, each from its own state; and in one call with segment ids, from zero after the first."""
    z = load(file)
    names = dict(query="q", key="k", value="v", log_decay="g")
    cuts = list(zip(z["cu_seqlens"][:-1].tolist(), z["cu_seqlens"][1:].tolist(), strict=True))
    ids = jnp.asarray(np.repeat(np.arange(len(cuts)), np.diff(z["cu_seqlens"])))[None]
    op = partial(ops.gated_linear_attention, scale=float(z["const_scale"]), chunk_size=16)

    def one_by_one(inputs):
        part = lambda a, b: {ours: inputs[theirs][:, a:b] for ours, theirs in names.items()}
        runs = [op(**part(a, b), initial_state=inputs["h0"][i : i + 1]) for i, (a, b) in enumerate(cuts)]
        outputs, states = zip(*runs, strict=True)
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(states)

    with jax.enable_x64(True):
        inputs, cotangents = cast(({n: z[n] for n in "qkvg"} | {"h0": z["h0"]}, (z["do"], z["dht"])), jnp.float64)
        expected = (z["o"], z["ht"]), {n: z[f"grad_{n}"] for n in inputs}
        assert_close(with_gradients(one_by_one, inputs, cotangents), expected, 1e-12)
        together = lambda i: op(**{a: i[b] for a, b in names.items()}, initial_state=i["h0"][:1], segment_ids=ids)
        first_only = lambda i: one_by_one(i | {"h0": i["h0"].at[1:].set(0)})
        outputs, final = with_gradients(together, inputs, (cotangents[0], cotangents[1][3:]))
        alone, alone_final = with_gradients(first_only, inputs, (cotangents[0], cotangents[1].at[:3].set(0)))
        assert_close((outputs[0], outputs[1], final), (alone[0], alone[1][3:], alone_final), 1e-12)


# ---- layers and the model ------------------------------------------------------------------------------------------

ATTENTION = {
    "q_proj.weight": "q_proj/kernel",
    "k_proj.weight": "k_proj/kernel",
    "v_proj.weight": "v_proj/kernel",
    "g_proj.weight": "gate_proj/kernel",
    "o_proj.weight": "out_proj/kernel",
    "gk_proj.0.weight": "decay_down/kernel",
    "gk_proj.1.weight": "decay_up/kernel",
    "gk_proj.1.bias": "decay_up/bias",
    "g_norm_swish_gate.weight": "norm/scale",
    "q_conv1d.weight": "q_conv/kernel",
    "k_conv1d.weight": "k_conv/kernel",
    "v_conv1d.weight": "v_conv/kernel",
}
STATE_SPACE = {
    "in_proj.weight": "in_proj/kernel",
    "conv1d.weight": "conv/kernel",
    "conv1d.bias": "conv/bias",
    "x_proj.weight": "x_proj/kernel",
    "dt_proj.weight": "dt_kernel",
    "dt_proj.bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj/kernel",
}
LAYERS = {
    "fla_layer_gla": (GLA(32, num_heads=2), ATTENTION),
    "fla_layer_gla_conv_gqa": (
        GLA(32, num_heads=4, num_kv_heads=2, expand_k=1.0, expand_v=2.0, conv_window=4), ATTENTION,
    ),
    "fla_layer_mamba": (Mamba(32, state_size=8), STATE_SPACE),
}  # fmt: skip


def as_ours(name, array):
    """[out, in] → [in, out]; a depthwise filter [D, 1, W] → [W, D]."""
    array = array[:, 0] if array.ndim == 3 else array
    return array.T if name.endswith("weight") and "embeddings" not in name else array


def renamed(arrays, names, prefix):
    found = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    flat = {names[name]: jnp.asarray(as_ours(name, a)) for name, a in found.items()}
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


@recorded
@pytest.mark.parametrize("file", LAYERS)
def test_layer(file):
    """Their module's output and gradients, whole and as prefill and steps. The bounds are theirs against float64."""
    (module, names), z = LAYERS[file], load(file)
    params, x = renamed(z, names, "w."), jnp.asarray(z["x"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), x))
    y, (d_params, d_x) = with_gradients(lambda p: module.apply(*p), (params, x), jnp.asarray(z["dy"]))
    assert_close(y, z["y"], 2e-6)
    assert_close(d_x, z["grad_x"], 4e-6)
    assert_close(d_params, renamed(z, names, "grad_w."), 5e-5)

    def decode(params, x):
        first, state = module.apply(params, x[:, :64], module.init_state(2), method="prefill")
        step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
        return jnp.concatenate([first, jax.lax.scan(step, state, x[:, 64:].swapaxes(0, 1))[1].swapaxes(0, 1)], axis=1)

    assert_close(quick_jit(decode)(params, x), z["y"], 2e-6)


def model_params(z, prefix):
    block = {f"attn.{theirs}": f"mixer/{ours}" for theirs, ours in ATTENTION.items()}
    block |= {f"mlp.{name}_proj.weight": f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    block |= {"attn_norm.weight": "mixer_norm/scale", "mlp_norm.weight": "mlp_norm/scale"}
    layers = [renamed(z, block, f"{prefix}model.layers.{i}.")["params"] for i in range(2)]
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

    (value, logits), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert_close(logits, z["logits"], 2e-6)
    assert_close(value, z["loss"], 1e-6)
    assert_close(gradients, model_params(z, "grad_w."), 5e-5)

    @quick_jit
    def greedy(params, prompt):
        logits, state = model.apply(params, prompt, model.init_state(2), method="prefill")
        pick = lambda logits: jnp.argmax(logits, -1).astype(jnp.int32)

        def step(carry, _):
            token, state = carry
            logits, state = model.apply(params, token, state, method="step")
            return (pick(logits), state), token

        return jax.lax.scan(step, (pick(logits[:, -1]), state), length=12)[1].T

    np.testing.assert_array_equal(greedy(params, tokens[:, : int(z["greedy_prompt_len"])]), z["greedy_tokens"])


# ---- mamba_ops -----------------------------------------------------------------------------------------------------


def _time_second(x):
    return jnp.moveaxis(x, -1, 1)


@recorded
@pytest.mark.parametrize("group", groups("mamba_ops", "selective_scan_"))
def test_selective_scan(group):
    """Values to 1e-5 in float32 and 1e-10 in float64, and every gradient, from their layout."""
    z = load("mamba_ops", group)
    inputs = {name: z[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if name in z}

    def scan(i):
        def moving(M):  # their B and C: `D N` constant, else `… N T`, complex ones as interleaved pairs over time
            if M.ndim == 2:
                return M
            if jnp.iscomplexobj(i["A"]):
                pairs = M.reshape(*M.shape[:-1], -1, 2)
                M = jax.lax.complex(pairs[..., 0], pairs[..., 1])
            return _time_second(M)

        dt = _time_second(i["delta"])
        dt = dt + i["delta_bias"][None, None] if "delta_bias" in i else dt
        dt = dt if group.endswith("no_softplus") else jax.nn.softplus(dt)
        y, state = ops.selective_scan(_time_second(i["u"]), dt, i["A"], moving(i["B"]), moving(i["C"]), i.get("D"))
        y = y * jax.nn.silu(_time_second(i["z"])) if "z" in i else y
        return y.swapaxes(1, 2), state

    with jax.enable_x64(True):
        assert_near(quick_jit(scan)(cast(inputs, jnp.float64)), (z["out_fp64"], z["last_state_fp64"]), 1e-10)
    # JAX pairs a complex cotangent without conjugation, and returns the conjugate of their gradient.
    cotangents = cast((z["grad_weight_out"], np.conj(z["grad_weight_state"])), jnp.float32)
    values, gradients = with_gradients(scan, cast(inputs, jnp.float32), cotangents)
    assert_near(values, (z["out"], z["last_state"]), 1e-5)
    assert_near(gradients, {name: np.conj(z[f"grad_{name}"]) for name in inputs}, 1e-4)


def ssd(i, initial_state=None, limits=None):
    dt = jax.nn.softplus(i["dt"] + i["dt_bias"][None, None])
    dt = dt if limits is None else jnp.clip(dt, *limits)
    y, state = ops.gated_linear_attention(
        i["C"], i["B"], dt[..., None] * i["x"], dt * i["A"][None, None], scale=1.0, initial_state=initial_state
    )
    y = y + (i["D"] if i["D"].ndim == 2 else i["D"][:, None])[None, None] * i["x"]
    return (y * jax.nn.silu(i["z"]) if "z" in i else y), state.swapaxes(2, 3)


@recorded
@pytest.mark.parametrize("group", ["ssd_basic", "ssd_groups2_z", "ssd_D_hdim", "ssd_ragged", "ssd_one_chunk"])
def test_ssd(group):
    z = load("mamba_ops", group)
    inputs = {name: z[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias") if name in z}
    with jax.enable_x64(True):
        exact, start = cast((inputs, z["initial_state"].swapaxes(2, 3)), jnp.float64)
        all_of = quick_jit(lambda i, s: (ssd(i), ssd(i, s), ssd(i, limits=z["dt_limit"].tolist())[0]))
        expected = (z["out_fp64"], z["final_state_fp64"]), (z["out_init_fp64"], z["final_state_init_fp64"])
        assert_near(all_of(exact, start), (*expected, z["out_dtlimit_fp64"]), 1e-10)
    cotangent = jnp.asarray(z["grad_weight_out"])
    value, gradients = with_gradients(lambda i: ssd(i)[0], cast(inputs, jnp.float32), cotangent)
    assert_near(value, z["out"], 2e-5)
    assert_near(gradients, {name: z[f"grad_{name}"] for name in inputs}, 2e-4)


@recorded
def test_ssd_minimal():
    z = load("mamba_ops", "ssd_minimal_basic")
    names = ("X", "A", "B", "C", "initial_states")

    def minimal(i):
        start = i["initial_states"][:, 0].swapaxes(2, 3)
        y, state = ops.gated_linear_attention(i["C"], i["B"], i["X"], i["A"], scale=1.0, initial_state=start)
        return y, state.swapaxes(2, 3)

    with jax.enable_x64(True):
        exact = quick_jit(minimal)(cast({n: z[n] for n in names}, jnp.float64))
        assert_near(exact, (z["Y_fp64"], z["final_state_fp64"]), 1e-10)
    cotangents = jnp.asarray(z["grad_weight_Y"]), jnp.asarray(z["grad_weight_state"])
    values, gradients = with_gradients(minimal, cast({n: z[n] for n in names}, jnp.float32), cotangents)
    assert_near(values, (z["Y"], z["final_state"]), 2e-5)
    assert_near(gradients, {n: z[f"grad_{n}"] for n in names}, 2e-4)


@recorded
@pytest.mark.parametrize("group", ["state_update_mamba1", "state_update_mamba2_g2"])
def test_one_decoding_step(group):
    """Heads and their channels in one row are the channels of the scan."""
    z = cast(load("mamba_ops", group), jnp.float32)
    batch, heads, size, N = z["state"].shape
    row = lambda a: a.reshape(-1, 1, heads * size)
    dt = jax.nn.softplus(row(z["dt"]) + row(z["dt_bias"]))
    A, D, start = z["A"].reshape(-1, N), z["D"].reshape(-1), z["state"].reshape(batch, -1, N)
    y, state = ops.selective_scan(row(z["x"]), dt, A, z["B"][:, None], z["C"][:, None], D, initial_state=start)
    assert_near(y * jax.nn.silu(row(z["z"])), row(z["out"]), 1e-5)
    assert_near(state, z["new_state"].reshape(batch, -1, N), 1e-5)


@recorded
@pytest.mark.parametrize("group", ["causal_conv1d_k4", "causal_conv1d_k2"])
def test_causal_convolution(group):
    z = cast(load("mamba_ops", group), jnp.float32)
    y, state = ops.short_convolution(z["x"].swapaxes(1, 2), z["weight"][:, 0].T, z["bias"])
    assert_near(jax.nn.silu(y), z["out"].swapaxes(1, 2), 1e-5)
    assert_near(state, z["conv_state"][..., 1:].swapaxes(1, 2), 1e-7)


# ---- S4D -----------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("group", groups("s4_kernels", "s4d_"))
def test_s4d_kernel_and_recurrence(group):
    """In float64 from the stored A, B, C, dt: discretisation, kernel, convolution, states and eight steps."""
    z = load("s4_kernels", group)
    rule = DISCRETISATIONS["bilinear" if "bilinear" in group else "zoh"]

    @quick_jit
    def everything(A, B, C, dt, D, u, state):
        log_A, B = rule(A, B, dt.astype(A.dtype))
        run = partial(ops.diagonal_state_space, log_A=log_A, B=B, C=C)
        step = lambda state, u: run(u[:, None], initial_state=state)[::-1]
        (y, final), (y0, final0) = run(u), run(u, initial_state=state)
        (z, z_final), skip = run(u, initial_state=state, impl="sequential"), D[None, None] * u
        eight = jax.lax.scan(step, jnp.zeros_like(state), u[:, :8].swapaxes(0, 1))[1][:, :, 0].swapaxes(0, 1)
        return {
            "A_bar": jnp.exp(log_A),
            "B_bar": B,
            "K_fp64": ops.diagonal_kernel(log_A, B, C, u.shape[1]).T,
            "y": (y + skip).swapaxes(1, 2),
            "final_state": final,
            "y_state0": [(y0 + skip).swapaxes(1, 2), (z + skip).swapaxes(1, 2)],
            "final_state_state0": [final0, z_final],
        }, (eight + skip[:, :8]).swapaxes(1, 2)

    with jax.enable_x64(True):
        operands = cast([z[name] for name in ("A", "B", "C", "dt", "D")], jnp.float64)
        actual, eight = everything(
            *operands, jnp.asarray(z["u"].swapaxes(1, 2), jnp.float64), jnp.asarray(z["state0"], jnp.complex128)
        )
    assert_near(actual, {k: [z[k]] * len(v) if isinstance(v, list) else z[k] for k, v in actual.items()}, 1e-10)
    np.testing.assert_allclose(eight, z["step8_fp32"], atol=1e-5)


class Discretised(S4D):
    """What the layer's own parameters become."""

    @nn.compact
    def prefill(self, x, state, segment_ids=None):
        return self._discrete(x.dtype), None


S4D_FIELDS = {
    "re_none": dict(real_map="none"), "re_relu": dict(real_map="relu"), "re_softplus": dict(real_map="softplus"),
    "im_exp": dict(imag_map="exp"), "dtsoftplus": dict(dt_map="softplus"), "untied_dt": dict(untied_dt=True),
    "shared_ab": dict(num_copies=1),
}  # fmt: skip


@recorded
@pytest.mark.parametrize("group", groups("s4_kernels", "s4d_"))
def test_s4d_parameters(group):
    """In float32 from the raw parameters through the layer's maps: the kernel, and the gradient of each."""
    z = load("s4_kernels", group)
    fields = next((fields for suffix, fields in S4D_FIELDS.items() if group.endswith(suffix)), {})
    rule = "bilinear" if "bilinear" in group else "zoh"
    H, L = z["u"].shape[1:]
    layer = Discretised(H, state_size=2 * z["A"].shape[1], discretisation=rule, **fields)
    pairs = lambda a: np.stack([a.real, a.imag], axis=-1)
    ours = lambda prefix: {
        "log_dt": z[f"{prefix}inv_dt"],
        "A_real": z[f"{prefix}A_real"],
        "A_imag": z[f"{prefix}A_imag"],
        "B": pairs(z[f"{prefix}B"][0]),
        "C": pairs(z[f"{prefix}C"][0]),
    }

    def kernel(params):
        log_A, B, C, _ = layer.apply({"params": params | {"D": jnp.zeros(H)}}, jnp.zeros((1, 1, H)))
        return ops.diagonal_kernel(log_A, B, C, L).T

    K, gradients = with_gradients(kernel, cast(ours("raw_"), jnp.float32), jnp.asarray(z["grad_weight"]))
    assert_near(K, z["K_fp64"], 2e-5)
    assert_near(gradients, ours("grad_"), 2e-4)


@recorded
@pytest.mark.parametrize("group", ["s4d_layer_0", "s4d_layer_1"])
def test_s4d_layer(group):
    """The authors' small layer takes imaginary parts with the other sign and B = 1."""
    z = load("s4_layers", group)
    H, M = z["kernel.A_imag"].shape
    module = S4D(H, state_size=2 * M)
    ones = np.stack([np.ones((H, M)), np.zeros((H, M))], axis=-1)

    def ours(prefix):
        get = lambda name: jnp.asarray(z[prefix + name])
        return {
            "log_dt": get("kernel.log_dt")[:, None],
            "A_real": get("kernel.log_A_real"),
            "A_imag": -get("kernel.A_imag"),
            "C": get("kernel.C"),
            "D": get("D"),
            "out_proj": {"kernel": get("output_linear.0.weight")[..., 0].T, "bias": get("output_linear.0.bias")},
        }

    layer = lambda i: module.apply({"params": i[0] | {"B": jnp.asarray(ones, jnp.float32)}}, i[1].swapaxes(1, 2))
    inputs, cotangent = (ours(""), jnp.asarray(z["u"])), jnp.asarray(z["grad_weight"].swapaxes(1, 2))
    y, gradients = with_gradients(layer, inputs, cotangent)
    np.testing.assert_allclose(y.swapaxes(1, 2), z["out"], atol=1e-5)
    assert_near(gradients, (ours("grad_"), z["grad_u"]), 2e-4)


@recorded
@pytest.mark.parametrize("size", [4, 8, 16, 64])
def test_hippo(size):
    z = load("s4_kernels", f"hippo_legs_N{size}")
    A, B = hippo_legs(size)
    eigenvalues, VB = legs_diagonal(size)
    assert_near([A, B, eigenvalues], [z["A"], z["B"], z["Lambda"]], 1e-10)
    clipped = np.abs(VB.imag) >= 2
    assert_near(np.abs(VB[~clipped]) ** 2, z["absVB2"][~clipped], 1e-8)


# ---- Chimera -------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("impl", ["sequential", "columns", "wavefront", "sweeps", None])
def test_grid_recurrence(impl):
    """With couplings both ways, one way and the other, variates in reverse, and the impulse response."""
    z = load("chimera_2dssm")
    one_way = "triangular" if impl == "wavefront" else impl  # the form that takes nothing else
    op = partial(ops.grid_recurrence, impl=impl)

    @quick_jit
    def everything(a1, a2, a3, a4, u1, u2, c1, c2, lti_a, lti_b):
        h1, h2 = op(a1, a2, a3, a4, u1, u2)
        impulse = jnp.zeros((1, *z["lti_kernel_h1"].shape, 1)).at[0, 0, 0, 0].set(1)
        return {
            "": (h1, h2),
            "_reversed_variates": op(a1, a2, a3, a4, u1, u2, reverse_variates=True),
            "_a2zero": op(a1, None, a3, a4, u1, u2, impl=one_way),
            "_a3zero": op(a1, a2, None, a4, u1, u2, impl=one_way),
            "lti": tuple(h[0, ..., 0] for h in op(*lti_a, lti_b[0] * impulse, lti_b[1] * impulse)),
        }, jnp.sum(c1 * h1 + c2 * h2, axis=-1)

    names = ("a1", "a2", "a3", "a4", "u1", "u2", "c1", "c2", "lti_a", "lti_b")
    states, y = everything(*cast([z[n] for n in names], jnp.float32))
    expected = {case: (z[f"h1{case}"], z[f"h2{case}"]) for case in states if case != "lti"}
    assert_near((states, y), (expected | {"lti": (z["lti_kernel_h1"], z["lti_kernel_h2"])}, z["y"]), 1e-5)


def test_the_index_lists_what_is_run():
    """No recorded S4D case goes unnoticed."""
    if not REFERENCE.exists():
        pytest.skip("the recorded outputs are not beside the repository")
    index = json.loads(bytes(np.load(REFERENCE / "s4_kernels.npz")["index_json"]).decode())
    assert {case["name"] for case in index if case["name"].startswith("s4d_")} == set(groups("s4_kernels", "s4d_"))


# ---- hidden Markov models ------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("impl", ["sequential", "parallel", "chunked"])
def test_hidden_markov_inference(impl):
    """log α, log p(x), γ, ξ, the path; and the gradients of the likelihood are the recorded posteriors."""
    z = load("seeds_hmm_glm")
    with jax.enable_x64(True):
        arrays = np.log(z["init"]), np.log(z["transition"]), z["emission_log_prob"][None]
        arrays = cast(arrays, jnp.float64)

        def everything(*arrays):
            filtered, evidence, _ = ops.hidden_markov_filter(*arrays, impl=impl)
            log_alpha = filtered + jnp.cumsum(evidence, axis=1)[..., None]
            likelihood = lambda *a: ops.hidden_markov_log_likelihood(*a, impl=impl).sum()
            gradients = jax.grad(likelihood, argnums=(0, 1, 2))(*arrays)
            return log_alpha, ops.hidden_markov_smoother(*arrays, impl=impl), gradients, ops.viterbi(*arrays, impl=impl)

        log_alpha, posterior, gradients, (path, _) = quick_jit(everything)(*arrays)
    expected = ops.HiddenMarkovPosterior(z["log_marginal"][None], z["gamma"][None], z["xi"][None])
    for actual, recorded_value in zip((log_alpha[0], *posterior), (z["log_alpha"], *expected), strict=True):
        np.testing.assert_allclose(actual, recorded_value, rtol=0, atol=1e-9)
    expected = z["gamma"][0], z["xi"].sum(0), z["gamma"][None]
    for actual, recorded_value in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, recorded_value, rtol=0, atol=1e-9)
    assert np.array_equal(path[0], z["viterbi"])


@recorded
@pytest.mark.parametrize("temperature, values", [(0.5, "gs_ll_tau05"), (1.0, "gs_ll_tau1")])
def test_gumbel_softmax_density(temperature, values):
    z = load("seeds_hmm_glm")
    with jax.enable_x64(True):
        log_x, log_weights = cast((np.log(z["gs_x"]), np.log(z["gs_mean"])), jnp.float64)
        actual = gumbel_softmax_log_density(log_x, log_weights, temperature)
    np.testing.assert_allclose(actual, z[values], rtol=0, atol=1e-9)
