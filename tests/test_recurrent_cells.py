"""Nonlinear cells as mixers: against recorded outputs, and solved in parallel at length."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import assert_close, random_params
from jax.nn.initializers import normal
from recorded import load, recorded
from sampled import by_default

from jaxseq.analysis import convexity_gap, local_lipschitz
from jaxseq.layers.initialisers import low_rank
from jaxseq.mixers import ELM, GRU, ICLRNN, LSTM, LeakyRNN
from jaxseq.mixers.leaky_rnn import LeakyRNNState
from jaxseq.tasks import match_bits, matches_last, parity_bits, parity_of_last
from jaxseq.train import projected


@recorded
def test_lstm_is_the_peers():
    """The low level of HiSS: a linear map, an LSTM over each chunk from its start, a linear map of the last state."""
    z = load("hiss")
    at = "lstm.p.low_level"
    get = lambda name: np.asarray(z[f"{at}.{name}"], np.float32)
    chunk = int(z["cfg.chunk"])
    x = np.asarray(z["x"]).reshape(-1, chunk, 4) @ get("embed.weight").T + get("embed.bias")
    params = {
        "in_proj": {"kernel": get("lstm.weight_ih_l0").T, "bias": get("lstm.bias_ih_l0") + get("lstm.bias_hh_l0")},
        "recurrent_kernel": get("lstm.weight_hh_l0").T,
    }
    for impl in ("sequential", "parallel"):
        y = jax.jit(LSTM(8, impl=impl).apply)({"params": params}, jnp.asarray(x))
        last = (y[:, -1] @ get("decoder.weight").T + get("decoder.bias")[None]).reshape(2, 6, 8)
        np.testing.assert_allclose(last, z["lstm.low_level_last"], atol=1e-5)


def test_gru_is_flax_s():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8)), jnp.float32)
    theirs = nn.RNN(nn.GRUCell(8, bias_init=nn.initializers.normal()))
    params = random_params(theirs, x)
    cell = params["params"]["cell"]
    side_by_side = lambda name, *gates: jnp.concatenate([cell[gate][name] for gate in gates], axis=-1)
    ours = {
        "in_proj": {name: side_by_side(name, "ir", "iz", "in") for name in ("kernel", "bias")},
        "recurrent_kernel": side_by_side("kernel", "hr", "hz", "hn"),
        "reset_bias": cell["hn"]["bias"],
    }
    assert_close(jax.jit(GRU(8).apply)({"params": ours}, x), jax.jit(theirs.apply)(params, x), "mixer")


slowly = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "kind, options",
    [
        slowly(LSTM, {}),
        slowly(LSTM, {"block_size": 128}),
        slowly(LSTM, {"jacobian": "diagonal"}),
        slowly(GRU, {}),
        slowly(LeakyRNN, {"jacobian": "diagonal"}),
        slowly(partial(ELM, num_memory=8, max_tau=100.0), {}),
        (partial(ICLRNN, hidden_sizes=(12,)), {}),
    ],
    ids=str,
)
def test_parallel_at_length(kind, options):
    """1,024 tokens, weights as they start and half as large again: equal to steps, without falling back."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1024, 8)), jnp.float32)
    params = jax.jit(kind(8).init)(jax.random.key(0), x[:, :1])

    @jax.jit
    def both(params):
        """Outputs and gradients of the loop and of Newton, and what this did."""
        pairs = []
        for module in (kind(8), kind(8, impl="parallel", **options)):
            y, pull, sown = jax.vjp(lambda p, m=module: m.apply(p, x, mutable=["intermediates"]), params, has_aux=True)
            pairs.append((y, pull(jnp.cos(y))))
        return *pairs, sown["intermediates"]["newton"]

    for scale in (1.0, 1.5):
        (expected, slopes), (y, gradients), (done,) = both(jax.tree.map(lambda w, scale=scale: scale * w, params))
        assert done.converged.all() and done.iterations.max() <= 100
        np.testing.assert_allclose(y, expected, atol=1e-5)
        assert_close(gradients, slopes, 1e-4)


@recorded
@pytest.mark.parametrize("leak, tag", [("inside", "default"), ("outside", "mod")])
def test_the_leaky_network_is_the_authors(leak, tag):
    """From their start state; τ below 1 counts as 1."""
    z = {name[len(tag) + 1 :]: a for name, a in load("seeds_leaky_rnn_timescales").items() if name.startswith(tag)}
    assert (z["tau"] < 1).any()
    with jax.enable_x64(True):
        params = {
            "in_proj": {"kernel": jnp.pad(jnp.asarray(z["W_in"].T), ((0, 11), (0, 0))), "bias": z["b_in"] + z["b"]},
            "recurrent_kernel": jnp.asarray(z["W"].T + np.diag(np.arange(1.0, 13))),  # its diagonal counts as zero
            "tau": jnp.asarray(z["tau"]),
        }
        x = jnp.pad(jnp.asarray(z["x"]).swapaxes(0, 1), ((0, 0), (0, 0), (0, 11)))
        for impl in ("sequential", "parallel"):
            module = LeakyRNN(12, leak=leak, impl=impl, param_dtype=jnp.float64)
            prefill = jax.jit(partial(module.apply, method="prefill"))
            y, _ = prefill({"params": params}, x, LeakyRNNState(jnp.asarray(z["h0"])))
            np.testing.assert_allclose(y.swapaxes(0, 1), z["h"][1:], atol=1e-9)
            out = np.einsum("bn,hon->hbo", y[:, -1], z["fcW"]) + z["fcb"][:, None]
            np.testing.assert_allclose(out, z["out"], atol=1e-9)


@recorded
@pytest.mark.parametrize("rank", [1, 3])
def test_a_network_of_low_rank_is_the_recorded_one(rank):
    """Without leak and self-connected: h_t = relu(h_{t-1} W + x_t W_in), W of a rank and of the norm of all of it."""
    z = load("seeds_rich_lazy_measures")
    with jax.enable_x64(True):
        x = jnp.pad(jnp.asarray(z["x"]).swapaxes(0, 1), ((0, 0), (0, 0), (0, 7)))
        start = low_rank(lambda *_: jnp.asarray(z["W0"].T), rank)
        module = LeakyRNN(
            10, slope=0.0, fixed_tau=1.0, self_connected=True, recurrent_init=start, param_dtype=jnp.float64
        )
        params = jax.jit(module.init)(jax.random.key(0), x)["params"]
        assert params.keys() == {"in_proj", "recurrent_kernel"}
        given = {"kernel": jnp.pad(jnp.asarray(z["Win"]), ((0, 7), (0, 0))), "bias": jnp.zeros(10)}
        y = jax.jit(module.apply)({"params": params | {"in_proj": given}}, x)
        np.testing.assert_allclose(y[:, -1], z[f"h_last_before_rank{rank}"], atol=1e-9)


@recorded
def test_bits_are_asked_as_the_authors_do():
    z = load("seeds_leaky_rnn_timescales")
    for ask, tag in ((parity_of_last, "parity"), (matches_last, "dms")):
        bits = jnp.asarray(z[f"{tag}_seq"][..., 0].T)
        found = np.stack([ask(bits, int(n)) for n in z["Ns"]])
        np.testing.assert_array_equal(found, z[f"{tag}_lab"])


def test_bits_are_balanced_and_refused():
    """Labels of fair bits within 45 to 55 %; rates of ones of their own make parity's bits uneven between sequences."""
    fair = match_bits(jax.random.key(0), num_examples=4096, length=12)
    assert all(0.45 < float(ask(fair, n).mean()) < 0.55 for ask in (parity_of_last, matches_last) for n in (4, 8, 12))
    uneven = parity_bits(jax.random.key(0), num_examples=4096, length=100).mean(axis=1)
    assert 0.25 < float(uneven.std()) < 0.33
    for count in (1, 13):
        with pytest.raises(ValueError, match=f"count={count}; of 12 bits it is the last 2 or more"):
            parity_of_last(fair, count)


@recorded
def test_the_convex_network_is_the_recorded_one():
    """Of raw kernels, after `contracted`; the two maps of [x, −x] are one and nothing, as its x is used as it is."""
    z = load("seeds_iclrnn")
    with jax.enable_x64(True):
        raw = {
            "layer_0_in_kernel": np.concatenate([z["raw_W1"], 0 * z["raw_W1"]]), "layer_1_in_kernel": z["raw_W2"],
            "layer_0_recurrent_kernel": z["raw_U1"], "layer_1_recurrent_kernel": z["raw_U2"],
            "layer_0_bias": z["b1"], "layer_1_bias": z["b2"],
            "out_kernel": np.pad(z["raw_Wo"], ((0, 0), (0, 2))), "out_bias": np.pad(z["bo"], (0, 2)),
        }  # fmt: skip
        params = ICLRNN.contracted({"params": jax.tree.map(jnp.asarray, raw)})
        theirs = {
            "layer_0_in_kernel": np.concatenate([z["constrained_W1"], 0 * z["constrained_W1"]]),
            "layer_0_recurrent_kernel": z["constrained_U1"], "layer_1_in_kernel": z["constrained_W2"],
            "layer_1_recurrent_kernel": z["constrained_U2"],
            "out_kernel": np.pad(z["constrained_Wo"], ((0, 0), (0, 2))),
        }  # fmt: skip
        for name, kernel in theirs.items():  # theirs is a power iteration, cut off
            np.testing.assert_allclose(params["params"][name], kernel, atol=1e-6)
        params = {"params": params["params"] | jax.tree.map(jnp.asarray, theirs)}
        for impl in ("sequential", "parallel"):
            f = jax.jit(ICLRNN(4, hidden_sizes=(8, 8), impl=impl, param_dtype=jnp.float64).apply)
            y = lambda x, f=f: np.asarray(f(params, jnp.asarray(x)))[..., :2]
            np.testing.assert_allclose(y(z["x"]), z["y"], atol=1e-9)
            gap = convexity_gap(y, z["x"], z["x_second"], np.full(len(z["x"]), float(z["mix"])))
            np.testing.assert_allclose(gap, z["convexity_gap"], atol=1e-9)


def convexity_gaps(module, params, pairs=1000):
    """The least over random pairs of sequences."""
    rng = np.random.default_rng(1)
    x, other = (jnp.asarray(rng.standard_normal((pairs, 6, 4)), jnp.float32) for _ in range(2))
    share = jnp.asarray(rng.random(pairs), jnp.float32)
    return float(convexity_gap(partial(jax.jit(module.apply), params), x, other, share).min())


def test_training_stays_convex_and_contracting():
    """After every projected step kernels are ≥ 0 of norm ≤ 1.001; an LSTM trained alike is not convex."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((32, 6, 4)), jnp.float32)
    target = jnp.cumsum(x**2, axis=1) / 4
    gaps = {}
    for module in (ICLRNN(4, hidden_sizes=(8, 8)), LSTM(4)):
        convex = isinstance(module, ICLRNN)
        project = ICLRNN.contracted if convex else lambda params: params
        params = project(jax.jit(module.init)(jax.random.key(0), x))
        optimizer = projected(optax.adam(1e-2), project)
        state = optimizer.init(params)

        @jax.jit
        def step(params, state, module=module, optimizer=optimizer):
            loss = lambda params: jnp.mean((module.apply(params, x) - target) ** 2)
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(60):
            with jax.numpy_dtype_promotion("standard"):  # optax
                params, state, value = step(params, state)
            losses.append(float(value))
            kernels = [W for name, W in params["params"].items() if name.endswith("kernel") and convex]
            assert all(W.min() >= 0 and np.linalg.norm(W, 2) <= 1.001 for W in kernels)
        assert losses[-1] < 0.9 * losses[0]
        gaps[type(module)] = convexity_gaps(module, params)
    assert gaps[ICLRNN] >= -1e-6 and gaps[LSTM] < -1e-3


def test_the_opened_network_bounds_how_far_outputs_move():
    """At no input is a contracted network steeper than all its units at once, one sign a channel; a raw one may be."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 6, 3)), jnp.float32)
    module = ICLRNN(3, hidden_sizes=(8, 8))
    shapes, apply = jax.eval_shape(module.init, jax.random.key(0), x), jax.jit(module.apply)
    raw = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), w.dtype), shapes)
    steepest = jax.jit(lambda params: local_lipschitz(lambda x: module.apply(params, x[None])[0], x))
    params = ICLRNN.contracted(raw)
    bounds = steepest(ICLRNN.opened(params))
    np.testing.assert_allclose(bounds, bounds[0], rtol=1e-5)
    assert 0.1 * bounds[0] < steepest(params).max() <= bounds[0]
    nearby = x + 1e-3 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    moved = np.linalg.norm(apply(params, nearby) - apply(params, x), axis=(1, 2))
    assert (moved <= (1 + 1e-2) * bounds[0] * np.linalg.norm(nearby - x, axis=(1, 2))).all()


def test_steepness_is_the_norm_of_a_derivative():
    rng = np.random.default_rng(0)
    A, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 4), (5, 4)))
    np.testing.assert_allclose(local_lipschitz(lambda x: A @ x, x), np.full(5, np.linalg.norm(A, 2)), rtol=1e-5)
    np.testing.assert_allclose(local_lipschitz(lambda x: (x @ x)[None], x), 2 * np.linalg.norm(x, axis=1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"inputs has shape \(0, 4\); local_lipschitz takes one or more"):
        local_lipschitz(lambda x: x, x[:0])


def test_a_projected_optimizer_needs_the_parameters():
    optimizer = projected(optax.sgd(0.1), lambda params: params)
    with pytest.raises(ValueError, match="params=None"):
        optimizer.update({"w": jnp.ones(2)}, optimizer.init({"w": jnp.ones(2)}))


def test_wrong_fields_are_named():
    x = jnp.zeros((1, 3, 4))
    for module, message in (
        (LeakyRNN(4, leak="both"), "leak='both'; LeakyRNN takes 'inside' or 'outside'"),
        (LeakyRNN(4, fixed_tau=np.inf), "fixed_tau=inf; LeakyRNN takes a number from 1 on, or None"),
        (LeakyRNN(4, slope=-0.1), "slope=-0.1; LeakyRNN takes 0 to 1"),
        (LeakyRNN(4, fixed_tau=0.5), "fixed_tau=0.5; LeakyRNN takes a number from 1 on, or None"),
        (LeakyRNN(4, recurrent_init=low_rank(normal(), 5)), r"rank=5; of a matrix of shape \(4, 4\) it is 1 to 4"),
        (ICLRNN(4, hidden_sizes=()), r"hidden_sizes=\(\); ICLRNN takes one or more layers"),
    ):
        with pytest.raises(ValueError, match=message):
            module.init(jax.random.key(0), x)
    params = jax.jit(ICLRNN(4).init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="margin=0.0; contracted takes a number above 0"):
        ICLRNN.contracted(params, margin=0.0)
    with pytest.raises(ValueError, match=r"params=\['kernel'\] hold no kernel of an ICLRNN"):
        ICLRNN.contracted({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="out_kernel has no weight above 0"):
        ICLRNN.contracted({"out_kernel": -jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="out_kernel has weights that are no finite numbers"):
        ICLRNN.contracted({"out_kernel": jnp.asarray([[1.0, np.nan]])})


def test_interleaved_branches_of_an_odd_width_read_every_channel():
    channels, there = ELM(5, num_branches=2, branch_size=3, routing="interleaved")._routes()
    assert sorted(channels[there]) == list(range(5))


@recorded
@pytest.mark.parametrize(
    "name", by_default(["v1_branch", "v2_plain"], ["v1_plain", "v1_branch", "v2_plain", "v2_branch"])
)
def test_the_leaky_memory_neuron_is_the_authors(name):
    """Traces, memories and outputs, which are padded to as many as the inputs."""
    z = load(f"seeds_elm_{name}")
    config = json.loads(str(z["config"]))
    D, outputs = config["num_input"], config["num_output"]
    branch = dict(num_branches=4, branch_size=5, routing="interleaved", activation="relu") if "branch" in name else {}
    with jax.enable_x64(True):
        module = ELM(
            D, config["num_memory"], version=int(name[1]), max_tau=config["memory_tau_max"], param_dtype=jnp.float64,
            step_size=config.get("delta_t", 1.0), **branch,
        )  # fmt: skip
        share = (z["tau_m"] - 1) / (config["memory_tau_max"] - 1)
        pad = lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, D - outputs)])
        params = {
            "synapses": z["proto_w_s"], "tau_logit": np.log(share / (1 - share)),
            "hidden_kernel": z["mlp_W0"].T, "hidden_bias": z["mlp_b0"],
            "update_kernel": z["mlp_W1"].T, "update_bias": z["mlp_b1"],
            "out_proj": {"kernel": pad(z["wy"].T), "bias": pad(z["by"])},
        }  # fmt: skip
        params = {"params": jax.tree.map(jnp.asarray, params)}
        x = jnp.asarray(z["x"])
        y, state = jax.jit(partial(module.apply, method="prefill"))(params, x, None)
        np.testing.assert_allclose(y[..., :outputs], z["y"], atol=1e-9)
        np.testing.assert_allclose(state.trace, z["syn_or_branch"][:, -1], atol=1e-9)
        np.testing.assert_allclose(state.memory, z["memory"][:, -1], atol=1e-9)
        np.testing.assert_allclose(jax.jit(module.clone(impl="parallel").apply)(params, x), y, atol=1e-9)
        if branch:
            at, there = module._routes()
            np.testing.assert_array_equal(there, z["route_mask"])
            np.testing.assert_array_equal(at[there], z["route_idx"][there])


def test_time_constants_start_spread_and_are_learned_if_told():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 4)), jnp.float32)
    for learn in (False, True):
        module = ELM(4, num_memory=6, max_tau=100.0, learn_tau=learn)
        params = jax.jit(module.init)(jax.random.key(0), x)
        tau = 1 + 99 * jax.nn.sigmoid(params["params"]["tau_logit"])
        np.testing.assert_allclose(tau, np.geomspace(1, 100, 6), rtol=1e-3)
        gradient = jax.jit(jax.grad(lambda p, m=module: m.apply(p, x).sum()))(params)["params"]["tau_logit"]
        assert bool(gradient.any()) == learn


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"routing": "neuronio"}, "routing='neuronio'; ELM takes none, interleaved, random"),
        ({"version": 3}, "version=3"),
        ({"num_branches": 3}, "num_branches=3 of branch_size=None"),
        ({"num_branches": 2, "routing": "random"}, "branch_size=None; ELM with routing"),
        ({"max_tau": 1.0}, "max_tau=1.0"),
        ({"max_tau": np.inf}, "max_tau=inf; ELM takes a number above 1"),
        ({"step_size": 0.0}, "step_size=0.0; ELM takes a number above 0"),
        (
            {"num_branches": 2, "branch_size": 1, "routing": "interleaved"},
            "branch_size=1: 2 interleaved branches of d_model=4 channels begin 2 apart",
        ),
    ],
)
def test_wrong_neurons_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ELM(4, **fields).init_state(1)
