"""Independent truth: outputs recorded from the authors' own code.

Covered (fla.md: tests/test_against_fla.py):
- seeds-models.md: hmm_glm.
- ssm.md: mamba_ops (all but rmsnorm_gated_*); s4_kernels s4d_* and hippo_legs_*; s4_layers s4d_layer_*.
- models.md: chimera_2dssm; zoology_layers based.
Waiting for the work that builds what they check: rmsnorm_gated_* (Mamba-2's norm); S4's own kernels, DSS and the
bidirectional blocks (s4_*, dss_*, s4_block_*); s5_lru; hf_mamba*.
"""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import cast
from recorded import REFERENCE, assert_near, groups, load, recorded, with_gradients

from jaxseq import S4D, ops
from jaxseq.layers.initialisers import hippo_legs, legs_diagonal
from jaxseq.mixers import Based
from jaxseq.models import gumbel_softmax_log_density
from jaxseq.ops.state_space import DISCRETISATIONS

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
        assert_near(jax.jit(scan)(cast(inputs, jnp.float64)), (z["out_fp64"], z["last_state_fp64"]), 1e-10)
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
        all_of = jax.jit(lambda i, s: (ssd(i), ssd(i, s), ssd(i, limits=z["dt_limit"].tolist())[0]))
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
        exact = jax.jit(minimal)(cast({n: z[n] for n in names}, jnp.float64))
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

    @jax.jit
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

    @jax.jit
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


# ---- Zoology -------------------------------------------------------------------------------------------------------


@recorded
def test_based():
    """The layer by the hand of Based's authors."""
    z = load("zoology_layers")
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
    params = {ours: {"kernel": jnp.asarray(z[f"based.p.proj_{theirs}.weight"].T)} for ours, theirs in names.items()}
    y = jax.jit(Based(16, num_heads=2, feature_width=4).apply)({"params": params}, jnp.asarray(z["x"]))
    assert_near(y, z["based.y"], 1e-6)


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

        log_alpha, posterior, gradients, (path, _) = jax.jit(everything)(*arrays)
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
