"""Independent truth: outputs recorded from the authors' own code.

Covered (fla.md: tests/test_against_fla.py; the linear state spaces of ssm.md: tests/test_against_state_spaces.py):
- seeds-models.md: hmm_glm.
- ssm.md: mamba_ops.
- models.md: chimera_2dssm; zoology_layers mha and based.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import cast
from recorded import assert_near, groups, load, recorded, with_gradients
from sampled import by_default

from jaxseq import ops
from jaxseq.layers.gated_norm import GatedRMSNorm
from jaxseq.mixers import Attention, Based
from jaxseq.models import gumbel_softmax_log_density

# ---- mamba_ops -----------------------------------------------------------------------------------------------------


def _time_second(x):
    return jnp.moveaxis(x, -1, 1)


SCANS = [f"selective_scan_{name}" for name in ("basic", "complex", "const_BC", "grouped_G2")]


@recorded
@pytest.mark.parametrize("group", by_default(SCANS, groups("mamba_ops", "selective_scan_")))
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
@pytest.mark.parametrize(
    "group",
    by_default(
        ["ssd_groups2_z", "ssd_D_hdim"], ["ssd_basic", "ssd_groups2_z", "ssd_D_hdim", "ssd_ragged", "ssd_one_chunk"]
    ),
)
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
@pytest.mark.parametrize("group", groups("mamba_ops", "rmsnorm_gated_"))
def test_gated_norm(group):
    z = load("mamba_ops", group)
    size = z["x"].shape[-1]
    module = GatedRMSNorm(size // int(z["group_size"]), gate_first=not bool(z["norm_before_gate"]))
    names = ("x", "z", "weight")
    run = lambda i: module.apply({"params": {"scale": i["weight"]}}, i["x"][None], i["z"][None])[0]
    inputs = {name: z[name].reshape(-1, size) if name != "weight" else z[name] for name in names}
    value, gradients = with_gradients(
        run, cast(inputs, jnp.float32), jnp.asarray(z["grad_weight_out"]).reshape(-1, size)
    )
    assert_near(value, z["out"].reshape(-1, size), 1e-5)
    assert_near(gradients, {name: z[f"grad_{name}"].reshape(inputs[name].shape) for name in names}, 1e-4)


@recorded
@pytest.mark.parametrize("group", ["causal_conv1d_k4", "causal_conv1d_k2"])
def test_causal_convolution(group):
    z = cast(load("mamba_ops", group), jnp.float32)
    y, state = ops.short_convolution(z["x"].swapaxes(1, 2), z["weight"][:, 0].T, z["bias"])
    assert_near(jax.nn.silu(y), z["out"].swapaxes(1, 2), 1e-5)
    assert_near(state, z["conv_state"][..., 1:].swapaxes(1, 2), 1e-7)


# ---- Chimera -------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("impl", by_default([None], ["sequential", "columns", "wavefront", "sweeps", None]))
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


@recorded
def test_attention():
    """Causal, of two heads: a channel of ones carries the biases that ours has not, one more value a head the last."""
    z = load("zoology_layers")
    x, W, b = z["x"], z["mha.p.Wqkv.weight"], z["mha.p.Wqkv.bias"]
    x = np.concatenate([x, np.ones((2, 32, 1)), np.zeros((2, 32, 1))], axis=2)
    kernels = np.zeros((18, 3, 2, 9))
    kernels[:17, :, :, :8] = np.concatenate([W.T, b[None]]).reshape(17, 3, 2, 8)
    kernels[:, 0] *= (9 / 8) ** 0.5  # so wide heads are scaled by less
    kernels[16, 2, :, 8] = 1
    out = np.zeros((2, 9, 18))
    out[:, :8, :16] = z["mha.p.out_proj.weight"].T.reshape(2, 8, 16)
    out[0, 8, :16] = z["mha.p.out_proj.bias"]
    named = dict(zip(("q_proj", "k_proj", "v_proj"), kernels.reshape(18, 3, 18).swapaxes(0, 1), strict=True))
    params = {name: {"kernel": kernel} for name, kernel in (named | {"out_proj": out.reshape(18, 18)}).items()}
    params, x = cast(({"params": params}, x), jnp.float32)
    y = jax.jit(Attention(18, num_heads=2, rotary_base=None).apply)(params, x)
    assert_near(y[..., :16], z["mha.y"], 1e-6)


# ---- hidden Markov models ------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("impl", by_default(["chunked"], ["sequential", "parallel", "chunked"]))
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
