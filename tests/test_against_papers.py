"""Independent truth: outputs recorded from the authors' own code, naive NumPy loops, and theorems.

Recorded values lie beside the repository, in `../shared/reference`; without them those tests are skipped. Covered:
- fla.md: gla, simple_gla, retention, lightning, linear_attn, rwkv6, mamba2_ssd, hgrn (ops); gla_packed,
  simple_gla_packed; layer_gla, layer_gla_conv_gqa, layer_mamba; model_gla.
- ssm.md: mamba_ops (all but rmsnorm_gated_*); s4_kernels s4d_* and hippo_legs_*; s4_layers s4d_layer_*.
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


def test_the_index_lists_what_is_run():
    """No recorded S4D case goes unnoticed."""
    if not REFERENCE.exists():
        pytest.skip("the recorded outputs are not beside the repository")
    index = json.loads(bytes(np.load(REFERENCE / "s4_kernels.npz")["index_json"]).decode())
    assert {case["name"] for case in index if case["name"].startswith("s4d_")} == set(groups("s4_kernels", "s4d_"))


# ---- theorems and naive loops --------------------------------------------------------------------------------------


def test_the_diagonal_of_legs_has_its_limit():
    """S4D, theorem 3: the diagonal part with B/2 acts as HiPPO-LegS does on smooth inputs, ever better as N grows."""
    steps, dt = 1500, 2e-3
    u = np.sin(np.arange(steps) * dt) ** 2  # smooth from the first moment on

    def error(N, halved=0.5):
        A, B = hippo_legs(N)
        P = np.sqrt(np.arange(N) + 0.5)
        eigenvalues, V = np.linalg.eigh(-1j * (A + np.outer(P, P) + np.eye(N) / 2))
        half, complex_A = slice(0, N // 2), -0.5 + 1j * eigenvalues
        np.testing.assert_allclose(complex_A[half], legs_diagonal(N)[0], atol=1e-8)
        forward, backward = np.eye(N) + dt / 2 * A, np.linalg.inv(np.eye(N) - dt / 2 * A)
        dense, x = np.zeros((steps, 4)), np.zeros(N)
        for t in range(steps):
            x = backward @ (forward @ x + dt * B * u[t])
            dense[t] = x[:4]
        with jax.enable_x64(True):
            rows = lambda a: jnp.asarray(np.broadcast_to(a, (4, N // 2)))
            log_A, B_bar = DISCRETISATIONS["bilinear"](
                rows(complex_A[half]), rows(halved * (V.conj().T @ B)[half]), jnp.full((4, 1), dt + 0j)
            )
            inputs = jnp.asarray(np.repeat(u[None, :, None], 4, axis=2))
            diagonal, _ = ops.diagonal_state_space(inputs, log_A, B_bar, jnp.asarray(V[:4, half]))
        return np.linalg.norm(np.asarray(diagonal[0]) - dense) / np.linalg.norm(dense)

    errors = [error(N) for N in (8, 16, 32, 64)]
    assert errors[-1] < 0.01
    assert all(4 * later < earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert error(64, halved=1.0) > 0.5


def test_the_gradient_of_the_decay_in_closed_form():
    """d log α_t = Σ_{i≥t} (q_i ⊙ dq_i − k_i ⊙ dk_i) + rowsum(S_T ⊙ ∂L/∂S_T), from any initial state."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.standard_normal((2, 37, 2, 4))) for _ in range(3))
        g, start = jnp.asarray(-rng.uniform(0, 2, (2, 37, 2, 4))), jnp.asarray(rng.standard_normal((2, 2, 4, 4)))
        names = ("query", "key", "value", "log_decay", "initial_state")
        inputs = dict(zip(names, (q, k, v, g, start), strict=True))
        d_o, d_S = jnp.asarray(rng.standard_normal(v.shape)), jnp.asarray(rng.standard_normal(start.shape))
        op = lambda i: ops.gated_linear_attention(**i, chunk_size=8)
        (_, S), d = with_gradients(op, inputs, (d_o, d_S))
        sums = jnp.cumsum((q * d["query"] - k * d["key"])[:, ::-1], axis=1)[:, ::-1]
        assert_close(d["log_decay"], sums + (S * d_S).sum(-1)[:, None], 1e-10)


def test_recurrences_against_loops():
    """GLA, RWKV-6's bonus, the selective scan and the plain recurrence, with restarts, as one reads them."""
    rng = np.random.default_rng(1)
    B, T, H, K, V = 2, 23, 2, 3, 4
    q, k = rng.standard_normal((2, B, T, H, K))
    v, g, u = rng.standard_normal((B, T, H, V)), -rng.exponential(1.0, (B, T, H, K)), rng.standard_normal((H, K))
    start, ids = rng.standard_normal((B, H, K, V)), np.cumsum(rng.random((B, T)) < 0.2, axis=1)
    o, with_bonus, S = np.zeros((B, T, H, V)), np.zeros((B, T, H, V)), start.copy()
    for b, t, h in np.ndindex(B, T, H):
        before = np.zeros((K, V)) if t and ids[b, t] != ids[b, t - 1] else S[b, h].copy()
        kv = np.outer(k[b, t, h], v[b, t, h])
        S[b, h] = np.exp(g[b, t, h])[:, None] * before + kv
        o[b, t, h] = K**-0.5 * S[b, h].T @ q[b, t, h]
        with_bonus[b, t, h] = K**-0.5 * (before + u[h][:, None] * kv).T @ q[b, t, h]
    with jax.enable_x64(True):
        common = dict(initial_state=start, segment_ids=ids)
        op = quick_jit(partial(ops.gated_linear_attention, chunk_size=8))
        assert_close(op(q, k, v, g, **common), (o, S), 1e-12)
        assert_close(op(q, k, v, g, bonus=u, **common), (with_bonus, S), 1e-12)

        x, dt, A = rng.standard_normal((B, T, 4)), rng.exponential(1.0, (B, T, 4)), -rng.exponential(1.0, (4, K))
        Bs, Cs, D, h = *rng.standard_normal((2, B, T, K)), rng.standard_normal(4), np.zeros((B, 4, K))
        y, states = np.zeros((B, T, 4)), np.zeros((B, T, 4, K))
        for b, t in np.ndindex(B, T):
            h[b] *= 0 if t and ids[b, t] != ids[b, t - 1] else 1
            h[b] = np.exp(dt[b, t][:, None] * A) * h[b] + np.outer(dt[b, t] * x[b, t], Bs[b, t])
            states[b, t], y[b, t] = h[b], h[b] @ Cs[b, t] + D * x[b, t]
        scan = quick_jit(partial(ops.selective_scan, chunk_size=8))
        assert_close(scan(x, dt, A, Bs, Cs, D, segment_ids=ids), (y, h), 1e-12)
        decay, inputs = np.exp(dt[..., None] * A), (dt * x)[..., None] * Bs[:, :, None]
        assert_close(ops.linear_recurrence(decay, inputs, segment_ids=ids), (states, h), 1e-12)


@pytest.mark.parametrize(
    "options", [{}, dict(window=4), dict(causal=False, window=3), dict(logit_softcap=1.5, scale=0.7)]
)
def test_attention_against_numpy(options):
    rng = np.random.default_rng(0)
    q, ids = rng.standard_normal((2, 11, 4, 6)), np.cumsum(rng.random((2, 14)) < 0.2, axis=1)
    k, v = rng.standard_normal((2, 14, 2, 6)), rng.standard_normal((2, 14, 2, 5))
    ids[1, 3:] = 7  # the queries of row 1 begin inside segment 7, and one of them sees nothing
    query_ids = ids[:, 3:].copy()
    query_ids[1, 4] = 99
    expected = np.zeros((2, 11, 4, 5))
    for b, t, h in np.ndindex(2, 11, 4):
        logits = options.get("scale", 6**-0.5) * k[b, :, h // 2] @ q[b, t, h]
        if "logit_softcap" in options:
            logits = options["logit_softcap"] * np.tanh(logits / options["logit_softcap"])
        lag = t + 3 - np.arange(14)
        seen = (ids[b] == query_ids[b, t]) & (np.abs(lag) < options.get("window", 99))
        seen &= (lag >= 0) | (not options.get("causal", True))
        weights = np.exp(logits) * seen
        expected[b, t, h] = weights @ v[b, :, h // 2] / max(weights.sum(), 1e-300)
    with jax.enable_x64(True):
        for impl in ("sequential", "parallel", "chunked"):
            op = lambda q, k, v, impl=impl: ops.softmax_attention(
                q, k, v, segment_ids=query_ids, key_segment_ids=ids, impl=impl, chunk_size=4, **options
            )
            loss = lambda *args, op=op: (jnp.sum(op(*args) ** 2), op(*args))
            gradients, actual = quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*map(jnp.asarray, (q, k, v)))
            assert_close(actual, expected, 1e-12)
            assert all(np.isfinite(x).all() for x in gradients)


def test_convolutions_against_numpy():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 15, 3)), rng.standard_normal((15, 3))
    weight, bias, before = rng.standard_normal((4, 3)), rng.standard_normal(3), rng.standard_normal((2, 3, 3))
    ids = np.cumsum(rng.random((2, 15)) < 0.2, axis=1)
    short, long, circular = np.zeros((3, 2, 15, 3))
    inputs, segment = np.concatenate([before, x], axis=1), np.concatenate([ids[:, :1]] * 3 + [ids], axis=1)
    for b, t, d in np.ndindex(2, 15, 3):
        same = segment[b, t : t + 4] == ids[b, t]
        short[b, t, d] = (weight[:, d] * same) @ inputs[b, t : t + 4, d] + bias[d]
        long[b, t, d] = np.convolve(x[b, :, d], kernel[:, d])[t]
        circular[b, t, d] = sum(kernel[(t - s) % 15, d] * x[b, s, d] for s in range(15))
    last = np.where((segment[:, 15:] == ids[:, -1:])[..., None], inputs[:, 15:], 0)
    with jax.enable_x64(True):
        actual = quick_jit(ops.short_convolution)(x, weight, bias, initial_state=before, segment_ids=ids)
        assert_close(actual, (short, last), 1e-12)
        assert_close(ops.long_convolution(x, kernel), long, 1e-12)
        assert_close(ops.long_convolution(x, kernel, causal=False), circular, 1e-12)
        assert_close(ops.long_convolution(x, np.stack([kernel, kernel])), long, 1e-12)
