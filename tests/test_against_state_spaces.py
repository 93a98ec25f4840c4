"""Linear state spaces against outputs recorded from their authors' code: S4, S4D, DSS, S5, LRU (ssm.md)."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import cast
from recorded import REFERENCE, assert_near, groups, load, recorded, with_gradients
from sampled import by_default

from jaxseq import S4D, ops
from jaxseq.layers.hippo import MEASURES, eigenbasis, hippo
from jaxseq.layers.initialisers import diagonal_plus_low_rank
from jaxseq.mixers import DSS, LRU, S4, S5
from jaxseq.ops.state_space import DISCRETISATIONS


def parts(a):
    return np.stack([a.real, a.imag], axis=-1)


def inner(mixer):
    """What the method of a mixer makes of its parameters alone."""

    class Inner(type(mixer)):
        @nn.compact
        def __call__(self, method):
            return getattr(self, method)(jnp.float32)

    fields = {name: getattr(mixer, name) for name in mixer.__dataclass_fields__ if name not in ("parent", "name")}
    return lambda params, method: Inner(**fields).apply({"params": params}, method)


# ---- S4D -----------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def of_s4d(rule, A, B, C, dt, D, u, state):
    """By the names of the recorded outputs, and eight steps; compiled once for all groups of a shape."""
    log_A, B = DISCRETISATIONS[rule](A, B, dt.astype(A.dtype))
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


@recorded
@pytest.mark.parametrize("group", groups("s4_kernels", "s4d_"))
def test_s4d_kernel_and_recurrence(group):
    """In float64 from the stored A, B, C, dt: discretisation, kernel, convolution, states and eight steps."""
    z = load("s4_kernels", group)
    with jax.enable_x64(True):
        operands = cast([z[name] for name in ("A", "B", "C", "dt", "D")], jnp.float64)
        u, state = jnp.asarray(z["u"].swapaxes(1, 2), jnp.float64), jnp.asarray(z["state0"], jnp.complex128)
        actual, eight = of_s4d("bilinear" if "bilinear" in group else "zoh", *operands, u, state)
    assert_near(actual, {k: [z[k]] * len(v) if isinstance(v, list) else z[k] for k, v in actual.items()}, 1e-10)
    np.testing.assert_allclose(eight, z["step8_fp32"], atol=1e-5)


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
    layer = S4D(H, state_size=2 * z["A"].shape[1], discretisation=rule, **fields)
    ours = lambda prefix: {
        "log_dt": z[f"{prefix}inv_dt"],
        "A_real": z[f"{prefix}A_real"],
        "A_imag": z[f"{prefix}A_imag"],
        "B": parts(z[f"{prefix}B"][0]),
        "C": parts(z[f"{prefix}C"][0]),
    }

    def kernel(params):
        log_A, B, C = inner(layer)(params, "_discrete")
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
    A, B, _ = hippo("legs", size)
    eigenvalues, _, VB = diagonal_plus_low_rank("legs", size)
    assert_near([A, B, eigenvalues], [z["A"], z["B"], z["Lambda"]], 1e-10)
    clipped = np.abs(VB.imag) >= 2
    assert_near(np.abs(VB[~clipped]) ** 2, z["absVB2"][~clipped], 1e-8)


def test_the_index_lists_what_is_run():
    """No recorded S4D case goes unnoticed."""
    if not REFERENCE.exists():
        pytest.skip("the recorded outputs are not beside the repository")
    index = json.loads(bytes(np.load(REFERENCE / "s4_kernels.npz")["index_json"]).decode())
    assert {case["name"] for case in index if case["name"].startswith("s4d_")} == set(groups("s4_kernels", "s4d_"))


def test_a_band_limit_silences_what_turns_too_fast():
    """As C set to zero by hand; the rate counts."""
    bare, limited = (S4D(3, 8, dt_min=0.1, dt_max=1.0, rate=1.5, bandlimit=b) for b in (None, 0.8))
    params = jax.jit(bare.init)(jax.random.key(0), jnp.zeros((1, 1, 3)))["params"]
    turns = 1.5 * np.exp(params["log_dt"]) * np.abs(params["A_imag"])  # a step, in radians
    fast = turns >= 0.8 * np.pi
    assert fast.any() and not fast.all()
    silent = params | {"C": jnp.where(fast[..., None], 0, params["C"])}
    kernel = lambda module, params: ops.diagonal_kernel(*inner(module)(params, "_discrete"), 20)
    assert_near(kernel(limited, params), kernel(bare, silent), 1e-6)
    with pytest.raises(ValueError, match="bandlimit=0.0; S4D takes a number above 0"):
        S4D(3, bandlimit=0.0).init_state(1)


def test_what_frozen_states_can_express():
    """The best kernel over C, a bump at lag 300, by how A starts: the frequencies decide, and have to be spread."""
    L, dt = 1024, np.array([1e-3, 2e-3, 4e-3, 1e-2])
    bump = np.exp(-0.5 * ((np.arange(L) - 300) / 10) ** 2)

    def error(name):
        module = S4D(len(dt), 64, name, num_copies=1)
        params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, len(dt))))["params"]
        log_A, B, _ = inner(module)(params | {"log_dt": jnp.log(dt)[:, None]}, "_discrete")
        modes = 2 * np.asarray(B)[:, None] * np.exp(np.arange(L)[:, None] * np.asarray(log_A, complex)[:, None])
        fits = (np.linalg.lstsq(K, bump)[0] @ K.T - bump for K in np.concatenate([modes.real, -modes.imag], axis=2))
        return min(map(np.linalg.norm, fits)) / np.linalg.norm(bump)

    found = {name: error(name) for name in ("lin", "inv", "legs", "real", "random", "quad")}
    assert found["lin"] < found["inv"] < found["legs"] < 0.3, found
    assert min(found[name] for name in ("real", "random", "quad")) > 0.5, found


def test_the_diagonal_of_legs_acts_as_all_of_it():
    """On a smooth input, the first four coordinates of the state, the wider the closer; with half of B, and not all."""
    steps, dt = 3000, 1e-3
    u = np.sin(np.pi * dt * np.arange(steps))

    @partial(jax.jit, static_argnums=0)
    def errors(size):
        A, B, P = hippo("legs", size)
        Lambda, V = eigenbasis(A, P)
        rows = lambda a: jnp.broadcast_to(jnp.asarray(a), (4, *np.shape(a)))
        L, B, C = rows(Lambda), rows(V.conj().T @ B), jnp.asarray(V[:4])  # a coordinate of the state a channel
        four, steps = jnp.broadcast_to(u[None, :, None], (1, len(u), 4)), jnp.full(4, dt)
        whole, _ = ops.dplr_state_space(four, L, rows(P @ V.conj()), B, C, steps)

        def off(half):
            log_A, B_bar = DISCRETISATIONS["bilinear"](L, half * B, steps[:, None].astype(L.dtype))
            alone, _ = ops.diagonal_state_space(four, log_A, B_bar, C)
            return jnp.linalg.norm(alone - whole) / jnp.linalg.norm(whole)

        return off(0.5), off(1.0)

    with jax.enable_x64(True):
        halved, full = np.transpose([errors(size) for size in (16, 32, 64, 128)])
    assert halved[2] < 0.01 and (halved[:-1] / halved[1:]).min() > 4, halved
    assert np.abs(full - 1).max() < 0.05, full


def test_copies_that_start_in_turn():
    """As each alone; a rank below the largest is filled with zeros."""
    x = jnp.zeros((1, 1, 4))
    start = lambda module: jax.jit(module.init)(jax.random.key(0), x)["params"]
    for kind, rank in ((partial(S4D, 4, 8), 0), (partial(S4, 4, 8), 1)):
        both, *alone = (start(kind(names, num_copies=2)) for names in (("legs", "fout"), "legs", "fout"))
        for name in ("A_real", "A_imag", "B") + ("P",) * rank:
            np.testing.assert_array_equal(both[name], jnp.stack([alone[i][name][i] for i in (0, 1)]))
    P = start(S4(4, 8, ("legt", "legs")))["P"]
    assert np.abs(P).max(axis=(2, 3)).astype(bool).tolist() == [[True, True], [True, False]] * 2


def test_starts_that_are_drawn():
    """Real parts from −U[0, 1]; the imaginary ones what each rule makes of numbers from U[0, N/2]."""
    module = S4D(9, 64, ("lin", "inv", "quad"), random_real=True, random_imag=True)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 9)))["params"]
    real, imag = np.exp(params["A_real"]), np.array(params["A_imag"])
    n = [imag[0::3] / np.pi, (64 / (imag[1::3] * np.pi / 64 + 1) - 1) / 2, (np.sqrt(np.pi * imag[2::3]) - 1) / 2]
    for drawn, most in ((real, 1), *((numbers, 32) for numbers in n)):
        assert 0 <= drawn.min() < 0.2 * most and 0.8 * most < drawn.max() <= most
    for starts in (dict(initialisation="lin"), dict(initialisation="random"), dict(random_imag=True)):
        with pytest.raises(ValueError, match="'sigmoid'.* reaches numbers below 1"):
            jax.jit(S4D(2, 4, imag_map="sigmoid", **starts).init)(jax.random.key(0), jnp.zeros((1, 1, 2)))
    for field in ("random_real", "random_imag"):
        with pytest.raises(ValueError, match=f"{field}=True, initialisation='legs'; drawn are those of inv, lin, quad"):
            S4D(2, 4, "legs", **{field: True}).init_state(1)


@pytest.mark.parametrize(
    "module, message",
    [
        (S4D(4, initialisation=()), r"initialisation=\(\); S4D takes one, or a tuple whose length divides 4"),
        (
            S4D(4, initialisation=("inv", "lin", "legs")),
            r"initialisation=\('inv', 'lin', 'legs'\); .* divides 4 copies",
        ),
        (
            S4D(4, initialisation=("inv", "lin"), num_copies=1),
            r"initialisation=\('inv', 'lin'\); .* divides 1 copies",
        ),
        (S4D(4, initialisation=("inv", "hippo")), "initialisation='hippo' is unknown to S4D; choose one of legs, fout"),
        (S4(4, measure=("legs", "lin")), "measure='lin' is unknown to S4; choose one of legs, legt"),
        (S4(4, measure=()), r"measure=\(\); S4 takes one, or a tuple"),
    ],
)
def test_starts_that_are_none(module, message):
    with pytest.raises(ValueError, match=message):
        module.init_state(1)


@pytest.mark.parametrize("kind", [S4, S4D, DSS])
def test_the_state_of_something_else(kind):
    module, x = kind(4, 2), jnp.zeros((1, 1, 4))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    other = LRU(4, 2).init_state(1)
    with pytest.raises(TypeError, match=f"state is a {type(other).__name__}; {kind.__name__} takes a StateSpaceState"):
        jax.eval_shape(partial(module.apply, method="prefill"), params, x, other)


@pytest.mark.parametrize("kind", [S4, S4D, DSS, S5])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_both_directions_by_kernels_and_by_steps(kind, length):
    """The default form and `sequential`, in value and gradient."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 4)), jnp.float32)
    module = kind(4, 4, bidirectional=True)
    params = jax.jit(module.init)(jax.random.key(0), x)
    weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    of = lambda impl: with_gradients(lambda i: module.clone(impl=impl).apply(*i), (params, x), weight)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), of(None), of("sequential"))


# ---- S4 ------------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize(
    "group", by_default(["s4_legs", "s4_legt_rank2"], ["s4_legs", "s4_legs_N64", "s4_fout", "s4_legt_rank2"])
)
def test_s4_kernel_and_recurrence(group):
    """From the stored Λ, P, B, C, dt: the kernel in float32 and float64; both forms, also in parts, in float64."""
    z = load("s4_kernels", group)
    L = z["u"].shape[2]
    operands = [z["Lambda"], np.moveaxis(z["P"], 0, 1), z["B"], z["C"]]
    kernel = jax.jit(lambda dt, *a: ops.dplr_kernel(*a, dt, L).T)
    assert_near(kernel(cast(z["dt"][:, 0], jnp.float32), *cast(operands, jnp.float32)), z["K_fp64"], 1e-4)

    @jax.jit
    def everything(u, dt, D, *a):
        run = lambda u, impl, state=None: ops.dplr_state_space(u, *a, dt, impl=impl, initial_state=state)
        y, final = run(u, "sequential")
        y_fft, final_fft = run(u, "convolution")
        first, state = run(u[:, :50], "convolution")
        second, final_parts = run(u[:, 50:], "convolution", state)
        skip = D[None, None] * u
        outputs = y + skip, y_fft + skip, jnp.concatenate([first, second], 1) + skip
        return [o.swapaxes(1, 2) for o in outputs], (final_fft, final_parts), (final, final)

    with jax.enable_x64(True):
        operands = cast([z["u"].swapaxes(1, 2), z["dt"][:, 0], z["D"], *operands], jnp.float64)
        assert_near(kernel(operands[1], *operands[3:]), z["K_fp64"], 1e-10)
        outputs, finals, final = everything(*operands)
    assert_near(outputs, [z["y"]] * 3, 1e-10)
    assert_near(finals, final, 1e-10)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("size", [4, 16, 64])
def test_every_measure_is_normal_plus_low_rank(measure, size):
    """V (Λ − p p*) V* over both halves is A, and V* B stands for B."""
    A, B, P = hippo(measure, size)
    half, V_half = eigenbasis(A, P)
    Lambda, V = np.concatenate([half, half.conj()]), np.concatenate([V_half, V_half.conj()], axis=1)
    p = P @ V.conj()
    np.testing.assert_allclose(V @ (np.diag(Lambda) - p.T @ p.conj()) @ V.conj().T, A, atol=1e-9 * np.abs(A).max())
    np.testing.assert_allclose(2 * (V_half @ (V_half.conj().T @ B)).real, B, atol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", by_default([8, 200], [8, 33, 200, 1024]))
def test_gradients_through_the_kernel_have_their_digits(measure, length):
    """In float32, at the starts that hardly decay over the sequence too: those of the recurrence in float64."""
    module = S4(2, state_size=64, measure=measure)
    x = np.random.default_rng(0).standard_normal((1, length, 2))
    start = jax.tree.map(np.asarray, jax.jit(module.init)(jax.random.key(0), jnp.asarray(x, jnp.float32)))

    def gradient(dtype, impl):
        run = module.clone(impl=impl, param_dtype=dtype).apply
        loss = lambda params: jnp.sum(jnp.sin(run(params, jnp.asarray(x, dtype))))
        return jax.jit(jax.grad(loss))(jax.tree.map(lambda p: jnp.asarray(p, dtype), start))

    found = gradient(jnp.float32, "convolution")
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, gradient(jnp.float64, "sequential"))
    error = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()), found, exact)
    assert max(jax.tree.leaves(error)) < 1e-3, error


@recorded
@pytest.mark.parametrize("name", ["s4_block_0", "s4_block_1", "s4_block_2"])
def test_s4_blocks(name):
    """Both directions and one, diagonal and of low rank: the kernels and the whole layer. Theirs holds C (1 − Ā^L)."""
    z = load("s4_layers", name)
    kernel, H = {k.rsplit(".", 1)[1]: a for k, a in z.items() if k.startswith("layer.kernel.")}, 8
    params = {
        "log_dt": kernel["inv_dt"],
        "A_real": kernel["A_real"],
        "A_imag": kernel["A_imag"],
        "B": kernel["B"][0],
        "D": z["layer.D"][0],
        "out_proj": {"kernel": z["output_linear.0.weight"].T, "bias": z["output_linear.0.bias"]},
    }
    options = dict(state_size=16, num_copies=len(kernel["A_real"]), bidirectional=len(kernel["C"]) == 2)
    C = kernel["C"][..., 0] + 1j * kernel["C"][..., 1]
    if "P" in kernel:
        module = S4(H, **options)
        params |= {"P": np.moveaxis(kernel["P"], 0, 1), "log_dt": params["log_dt"][:, 0]}
        C = whole_readout(params, C, 64)
    else:
        module = S4D(H, discretisation=json.loads(bytes(z["kwargs_json"]).decode())["disc"], **options)
    params |= {name: parts(c) for name, c in zip(("C", "C_backward"), C, strict=False)}
    y = jax.jit(module.apply)({"params": cast(params, jnp.float32)}, jnp.asarray(z["u"]))
    np.testing.assert_allclose(y, z["out"], atol=1e-5)


def whole_readout(params, C, length):
    """C of C (1 − Ā^L), by dense matrices."""
    pair = lambda x: np.concatenate([x, x.conj()], axis=-1)
    p = pair(params["P"][0, 0, :, 0] + 1j * params["P"][0, 0, :, 1])
    Lambda = pair(-np.exp(params["A_real"][0].astype(float)) - 1j * params["A_imag"][0])
    A, one = np.diag(Lambda) - np.outer(p, p.conj()), np.eye(len(p))
    out = []
    for h, dt in enumerate(np.exp(params["log_dt"].astype(float))):
        step = np.linalg.solve(one - dt / 2 * A, one + dt / 2 * A)
        out.append(np.linalg.solve((one - np.linalg.matrix_power(step, length)).T, pair(C[:, h]).T).T)
    return np.stack(out, axis=1)[..., : C.shape[-1]]


# ---- DSS -----------------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("group", groups("s4_layers", "dss_"))
def test_dss_kernel(group):
    """The kernel from the raw parameters, and the gradient of each."""
    z = load("s4_layers", group)
    version = group.split("_")[1].replace("-", "_")
    H, L = z["K_fp32"].shape
    module = DSS(H, 16, version, L, separate_dt=z["log_dt"].ndim == 2)

    def ours(prefix):
        get = lambda name: z[f"{prefix}{name}"]
        real, imaginary = get("Lambda").T if "Lambda" in z else (get("Lambda_log_neg_re"), get("Lambda_im"))
        return {"log_dt": get("log_dt").reshape(H, -1), "A_real": real, "A_imag": imaginary, "C": get("W")[0]}

    def kernel(params):
        z, B, w = inner(module)(params, "_discrete")
        return ops.diagonal_kernel(z, B, w / 2, L).T

    K, gradients = with_gradients(kernel, cast(ours(""), jnp.float32), jnp.asarray(z["grad_weight"]))
    assert_near(K, z["K_fp64_eps"] if "K_fp64_eps" in z else z["K_fp64"], 5e-5)
    expected = ours("grad_")
    if version == "softmax" and (growing := z["Lambda"][:, 0] > 0).any():
        # They hold the largest power fixed where Re Λ > 0: no gradient of the kernel. Ours is that of the definition.
        del expected["log_dt"], gradients["log_dt"]
        expected, gradients = (g | {n: g[n][~growing] for n in ("A_real", "A_imag")} for g in (expected, gradients))
    assert_near(gradients, expected, 2e-4)


def test_the_gradient_of_a_softmax_with_growing_powers():
    """Of both signs of Re Λ, against a softmax written out."""
    rng, L = np.random.default_rng(0), 40
    module = DSS(3, 4, "softmax", L, separate_dt=False)
    params = {"log_dt": rng.uniform(-4, -2, (3, 1)), "A_real": np.array([0.5, -0.5, 1.0, -1.0])}
    params |= {"A_imag": rng.uniform(0.5, 9, 4), "C": rng.standard_normal((3, 4, 2))}

    def written_out(p):
        Lambda = jax.lax.complex(p["A_real"], p["A_imag"])[None]
        z = jnp.exp(p["log_dt"]).astype(Lambda.dtype) * Lambda
        powers = jnp.exp(jnp.arange(L).astype(z.dtype)[:, None, None] * z[None])
        w = jax.lax.complex(p["C"][..., 0], p["C"][..., 1]) / Lambda
        return jnp.sum(w[None] * powers / powers.sum(0, keepdims=True), axis=-1).real

    def kernel(p):
        z, B, w = inner(module)(p, "_discrete")
        return ops.diagonal_kernel(z, B, w / 2, L)

    cotangent = rng.standard_normal((L, 3)).astype(np.float32)
    both = [with_gradients(f, cast(params, jnp.float32), jnp.asarray(cotangent)) for f in (kernel, written_out)]
    assert_near(both[0], both[1], 1e-4)


@recorded
def test_the_softmax_of_dss_in_s4():
    """Their other hand: no conjugate pairs, each copy with a Λ of its own."""
    z = load("s4_kernels", "dss_softmax_legs")
    L = z["u"].shape[2]
    A, B, C, dt = (cast(z[name], jnp.float32) for name in ("A", "B", "C", "dt"))
    for h in range(len(A)):
        module = DSS(1, A.shape[1], "softmax", L, separate_dt=False)
        params = {"log_dt": jnp.log(dt[h : h + 1].real), "A_real": A[h].real, "A_imag": A[h].imag}
        params["C"] = jnp.asarray(parts(np.asarray(B[h] * C[h]))[None])
        z_, B_, w = inner(module)(params, "_discrete")
        assert_near(ops.diagonal_kernel(z_, B_, w / 2, L)[:, 0], z["K_fp64"][h], 5e-5)


def test_a_growing_softmax_is_finite():
    """Λ may cross zero: the kernel is a softmax still, its largest entry the last."""
    module = DSS(2, 2, "softmax", 300, separate_dt=False)
    params = {"log_dt": jnp.zeros((2, 1)), "A_real": jnp.asarray([0.2, -0.2]), "A_imag": jnp.asarray([0.01, 0.01])}
    params["C"] = jnp.asarray([[[1.0, 0], [0, 0]], [[0, 0], [1.0, 0]]])
    z, B, w = inner(module)(params, "_discrete")
    growing, falling = np.asarray(ops.diagonal_kernel(z, B, w / 2, 300)).T
    assert np.isfinite(growing).all() and np.abs(growing).argmax() > 290 and np.abs(falling).argmax() < 10


def test_both_steps_of_dss_start_alike():
    """One draw a channel, for the real and the imaginary part of Λ."""
    start = lambda module: jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 5)))["params"]
    of = lambda separate: start(DSS(5, 2, separate_dt=separate))
    log_dt = of(True)["log_dt"]
    assert log_dt.shape == (5, 2) and of(False)["log_dt"].shape == (5, 1)
    np.testing.assert_array_equal(log_dt[:, 0], log_dt[:, 1])
    assert len(np.unique(log_dt)) == 5


# ---- S5 and the LRU ------------------------------------------------------------------------------------------------


@recorded
@pytest.mark.parametrize("group", groups("s5_lru", "s5_"))
def test_s5(group):
    z = load("s5_lru", group)
    config = json.loads(bytes(z["config_json"]).decode())
    module = S5(
        config["H"], config["P"], config["blocks"], config["conj_sym"], config["disc"], clip=config.get("clip", False),
        rate=config.get("step_rescale", 1.0), bidirectional=config.get("bidir", False), output="identity",
    )  # fmt: skip
    names = ("Lambda_re", "Lambda_im", "B", "C", "D", "log_step")
    run = lambda i: module.apply({"params": i[0]}, i[1][None])[0]
    of = lambda prefix: ({name: z[prefix + name] for name in names}, z[f"{prefix}u"])
    y, gradients = with_gradients(run, cast(of(""), jnp.float32), jnp.asarray(z["grad_weight"]))
    np.testing.assert_allclose(y, z["y_fp32"], atol=5e-5)
    assert_near(gradients, of("grad_"), 2e-4)
    with jax.enable_x64(True):
        assert_near(jax.jit(run)(cast(of(""), jnp.float64)), z["y"], 1e-10)


@recorded
@pytest.mark.parametrize("group", groups("s5_lru", "s5_"))
def test_s5_starts_in_their_basis(group):
    """The blocks of V, up to a phase of each vector."""
    z = load("s5_lru", group)
    config = json.loads(bytes(z["config_json"]).decode())
    size = config["P"] // config["blocks"]
    A, _, P = hippo("legs", size)
    eigenvalues, V = eigenbasis(A, P)
    count = len(eigenvalues)
    assert_near(np.abs(V), np.abs(z["V"][:size, :count]), 1e-5)


@pytest.mark.parametrize("start, bound", [("trunc_standard_normal", 1), ("lecun_normal", 1 / 8), ("complex_normal", 8)])
def test_how_the_readout_of_s5_starts(start, bound):
    """Norms of the rows, of 64 states: one, one over √d_model, and √64 of what is not rotated."""
    params = jax.jit(S5(64, 128, C_init=start).init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]
    norms = np.linalg.norm(params["C"], axis=(1, 2))
    assert abs(norms.mean() / bound - 1) < 0.1 and norms.std() < 0.2 * bound


def test_intervals_of_s5():
    """An input held for three steps is one of three; intervals of two are a rate of two, and steps are the whole."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4)), jnp.float32)
    run = S5(4, 8, dt_min=0.1, dt_max=0.5, output="identity")
    params = jax.jit(run.init)(jax.random.key(0), x)
    held = jnp.array([1, 3, 2, 1, 3])
    ends = jnp.cumsum(held) - 1
    at_once = run.apply(params, x, intervals=jnp.broadcast_to(held[None].astype(float), (2, 5)))
    assert_near(at_once, run.apply(params, jnp.repeat(x, held, axis=1))[:, ends], 1e-5)
    twos = jnp.full((2, 5), 2.0)
    assert_near(run.apply(params, x, intervals=twos), run.clone(rate=2.0).apply(params, x), 1e-6)
    ids, waits = jnp.array([[0, 0, 1, 1, 1]] * 2), jax.random.uniform(jax.random.key(1), (2, 5), maxval=3.0) + 0.1
    parts = [run.apply(params, x[:, s], intervals=waits[:, s]) for s in (slice(2), slice(2, 5))]
    assert_near(run.apply(params, x, ids, intervals=waits), jnp.concatenate(parts, axis=1), 1e-5)
    with jax.enable_x64(True):
        *given, wide = cast((params, x, waits), jnp.float64)
        total = lambda waits: jnp.sum(jnp.sin(run.clone(param_dtype=jnp.float64).apply(*given, intervals=waits)))
        slope = (total(wide + 1e-5) - total(wide - 1e-5)) / 2e-5
        np.testing.assert_allclose(jnp.sum(jax.grad(total)(wide)), slope, rtol=1e-6)
    state, outputs = run.init_state(2), []
    for t in range(5):
        y, state = run.apply(params, x[:, t], state, intervals=jnp.full(2, float(held[t])), method="step")
        outputs.append(y)
    assert_near(jnp.stack(outputs, axis=1), at_once, 1e-5)
    with pytest.raises(ValueError, match="intervals holds inf; S5 takes finite numbers of steps, 0 or more"):
        run.apply(params, x, intervals=twos.at[0, 3].set(jnp.inf))
    with pytest.raises(ValueError, match="intervals: .*bidirectional=True.* takes none"):
        S5(4, 8, bidirectional=True).init(jax.random.key(0), x, intervals=twos)


@recorded
@pytest.mark.parametrize("group", ["lru_full", "lru_ring"])
def test_lru(group):
    z = load("s5_lru", group)
    H, N = z["D"].size, z["nu_log"].size
    module = LRU(H, N, output="identity")

    def ours(prefix):
        get = lambda name: z[f"{prefix}{name}"]
        pair = lambda name: np.stack([get(f"{name}_re"), get(f"{name}_im")], axis=-1)
        rest = {name: get(name) for name in ("nu_log", "theta_log", "gamma_log", "D")}
        return rest | {"B": pair("B"), "C": pair("C")}, get("u")

    both = lambda i: module.apply({"params": i[0]}, i[1][None], None, method="prefill")
    run = lambda i: both(i)[0][0]
    y, gradients = with_gradients(run, cast(ours(""), jnp.float32), jnp.asarray(z["grad_weight"]))
    np.testing.assert_allclose(y, z["y_fp32"], atol=5e-5)
    assert_near(gradients, ours("grad_"), 2e-4)
    with jax.enable_x64(True):
        y, state = jax.jit(both)(cast(ours(""), jnp.float64))
        assert_near((y[0], state.hidden[0]), (z["y"], z["final_state"]), 1e-10)


def test_white_noise_keeps_its_power_in_the_lru():
    """On the ring of 0.9 to 0.999 the normalised state has the power of its input; without γ 24 times as much."""
    T, module = 5000, LRU(1, 256, r_min=0.9, r_max=0.999)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, 1)))["params"]
    u = jnp.asarray(np.random.default_rng(0).standard_normal((T, 256)))
    decay = jnp.exp(jax.lax.complex(-jnp.exp(params["nu_log"]), jnp.exp(params["theta_log"])))
    power = {}
    for name, gamma in (("normalised", jnp.exp(params["gamma_log"])), ("plain", jnp.ones(256))):
        inputs = (gamma[None] * u)[None].astype(decay.dtype)
        x, _ = ops.linear_recurrence(decay[None, None], inputs)
        power[name] = float(jnp.mean(jnp.abs(x[:, T // 2 :]) ** 2))
    expected = np.log((1 - 0.9**2) / (1 - 0.999**2)) / (0.999**2 - 0.9**2)
    assert abs(power["normalised"] - 1) < 0.2
    assert abs(power["plain"] / expected - 1) < 0.2


@recorded
@pytest.mark.parametrize(
    "measure, group",
    by_default([("legt", "s4_legt_rank2")], [("legs", "s4_legs"), ("legs", "s4_legs_N64"), ("legt", "s4_legt_rank2")]),
)
def test_s4_starts_as_theirs(measure, group):
    """Λ, |B| and |P| of the layer that nobody trained."""
    z = load("s4_kernels", group)
    module = S4(len(z["Lambda"]), 2 * z["Lambda"].shape[1], measure)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, len(z["Lambda"]))))["params"]
    Lambda, P, B, *_ = inner(module)(params, "_continuous")
    assert_near(Lambda, z["Lambda"], 1e-4)
    assert_near(np.abs(np.imag(B)).max(), np.abs(np.imag(z["B"])).max(), 1e-4)
    ours, theirs = np.linalg.norm(P, axis=-1).T, np.linalg.norm(z["P"], axis=-1)  # the rows of P come in any order
    assert_near(np.sort(ours, axis=0), np.sort(theirs, axis=0), 1e-4)
