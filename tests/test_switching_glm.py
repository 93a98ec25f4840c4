"""The switching GLM: its simulation, emissions and priors, both ways to fit it, and recorded spike trains."""

import gzip
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import assert_close
from scipy import stats

from jaxseq.analysis import matched_states
from jaxseq.data import spike_counts
from jaxseq.learn import HiddenMarkovState, best_fit, expectation_maximisation, gradient_ascent, hidden_markov_start
from jaxseq.models import SwitchingGLM, gumbel_softmax_log_density, one_hot_parameters
from jaxseq.models.switching_glm import BASIS, history
from jaxseq.ops import hidden_markov_log_likelihood
from jaxseq.tasks import switching_spikes

RECORDED = Path(__file__).parents[2] / "shared" / "data" / "spike_trains"
S, N, T = 3, 4, 60


@pytest.fixture(scope="module")
def drawn():
    draw = partial(switching_spikes, num_sequences=2, length=T, num_states=S, num_neurons=N)
    return jax.device_get(jax.jit(draw)(jax.random.key(0)))


def test_the_simulation_is_what_it_says():
    draw = partial(switching_spikes, num_sequences=30, length=200, num_states=3, num_neurons=10, stay=0.9)
    draw = jax.jit(draw)
    x, again = (jax.device_get(draw(jax.random.key(3))) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(x, again, strict=True))
    assert abs((x.states[:, 1:] == x.states[:, :-1]).mean() - 0.9) < 0.01
    assert np.allclose(np.bincount(x.states[:, 100:].ravel()) / x.states[:, 100:].size, 1 / 3, atol=0.1)
    assert abs((x.weights == 0).mean() - 0.8) < 0.1 and np.abs(x.weights).max() < np.log(4)
    assert np.abs(x.bias).max() <= 0.05
    # The counts have the mean that weights, states and past say, and Poisson's variance.
    features = np.asarray(history(jnp.asarray(x.counts, jnp.float32)))
    rate = 1 / (1 + np.exp(-x.bias - np.einsum("btnm,btm->btn", x.weights[x.states], features)))
    residual = (x.counts - rate) / np.sqrt(rate)
    assert np.abs(residual.mean((0, 1))).max() < 5 / np.sqrt(residual[..., 0].size)
    assert abs(residual.var() - 1) < 0.02


def test_emissions_are_poisson_given_the_past(drawn):
    model = SwitchingGLM(S, N)
    counts = drawn.counts.astype(np.float64)
    features = np.zeros((2, T, N))
    for t in range(T):
        for k, phi in enumerate(BASIS, start=1):
            features[:, t] += phi * counts[:, t - k] if t >= k else 0
    assert np.allclose(BASIS, [0.6364, 0.2341, 0.0861, 0.0317, 0.0117], atol=5e-5)
    drive = drawn.bias + np.einsum("snm,btm->btsn", drawn.weights.astype(float), features)
    for link, g in (("sigmoid", lambda u: 1 / (1 + np.exp(-u))), ("softplus", lambda u: np.log1p(np.exp(u)))):
        expected = stats.poisson.logpmf(counts[:, :, None], g(drive)).sum(-1)
        params = {"params": {"weight": drawn.weights, "bias": drawn.bias}}
        assert_close(jax.jit(model.clone(link=link).apply)(params, drawn.counts), expected, 1e-5)


def test_the_gaussian_prior_is_the_best_over_its_mean():
    model, weights = SwitchingGLM(S, N, "gaussian"), np.random.default_rng(0).standard_normal((S, N, N))
    value = lambda w: model.apply({"params": {"weight": w, "bias": jnp.zeros(N)}}, method="log_prior")
    with jax.enable_x64(True):
        prior, slope = jax.value_and_grad(value)(jnp.asarray(weights))
    mean, prior = weights.mean(0), float(prior)
    density = lambda centre: (
        stats.norm.logpdf(weights, centre, 1 / 3).sum() - stats.norm.logpdf(0, 0, 1 / 3) * S * N * N
    )
    assert_close(prior, density(mean), 1e-12)
    assert all(density(mean + d) < prior for d in (-0.01, 0.01))
    assert_close(slope, -9 * (weights - mean), 1e-12)


def test_the_one_hot_prior_draws_in_training_and_rounds_in_evaluation():
    weights = np.asarray([[[0.9, 0.05], [-0.7, 0.2]], [[1.2, -0.1], [-0.4, 0.0]]], np.float32)
    model, params = SwitchingGLM(2, 2, "one_hot"), one_hot_parameters(weights, np.zeros(2))
    rounded = model.apply(params, method="weights")
    assert_close(rounded, np.where(np.abs(weights) > 0.3, weights, 0), 1e-6)
    draw = jax.jit(lambda key: model.apply(params, method="weights", rngs={"gumbel": key}))
    one, same, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
    assert np.array_equal(one, same) and not np.allclose(one, other)
    assert (np.abs(one) <= np.abs(np.log1p(np.exp(params["params"]["strength"]))) + 1e-6).all()
    a, shares = (jax.nn.softmax(params["params"][name]) for name in ("adjacency", "shares"))
    density = gumbel_softmax_log_density(jnp.log(a), jnp.log(shares)[None], 0.5).sum()
    assert_close(model.apply(params, method="log_prior"), density, 1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_gumbel_softmax_density_integrates_to_one(temperature):
    rng, weights = np.random.default_rng(0), np.asarray([0.5, 0.3, 0.2])
    # By importance sampling from Dirichlet(1/2), whose density grows at the corners as well.
    x = rng.dirichlet([0.5] * 3, 200_000)
    log_proposal = stats.dirichlet.logpdf(x.T, [0.5] * 3)
    with jax.enable_x64(True):
        log_x = np.log(np.maximum(x, 1e-300))
        values = gumbel_softmax_log_density(jnp.asarray(log_x), jnp.log(jnp.asarray(weights))[None], temperature)
    ratio = np.exp(np.asarray(values) - log_proposal)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(ratio)) < 0.1


def fit(rule, model, params, counts, optimizer, rounds, inner=1):
    """The objective before every round, and the last state."""
    state = hidden_markov_start(params, optimizer, S, jax.random.key(1), 0.7, transition=rule is gradient_ascent)
    run = lambda s: jax.lax.scan(lambda s, _: rule(model, optimizer, inner)(s, counts), s, length=rounds)
    return jax.jit(run)(state)


def test_an_exact_transition_step_never_loses(drawn):
    """Emissions held: P alone moves, the likelihood never falls, and ends where its gradient is nought."""
    with jax.enable_x64(True):
        counts, model = jnp.asarray(drawn.counts), SwitchingGLM(S, N, "gaussian")
        params = {"params": {"weight": jnp.asarray(drawn.weights, float), "bias": jnp.asarray(drawn.bias, float)}}
        state, objective = fit(expectation_maximisation, model, params, counts, optax.sgd(0.0), 300)
        assert (np.diff(objective) > -1e-6).all() and objective[-1] > objective[0] + 0.1
        assert_close(jnp.exp(state.log_transition).sum(1), np.ones(S), 1e-12)
        start, emissions = jnp.full(S, -jnp.log(S)), model.apply(params, counts)
        likelihood = lambda logits: hidden_markov_log_likelihood(start, jax.nn.log_softmax(logits), emissions).sum()
        begun = hidden_markov_start(params, optax.sgd(0.0), S, jax.random.key(1), 0.7).log_transition
        slope, first_slope = (jax.jit(jax.grad(likelihood))(P) for P in (state.log_transition, begun))
        assert np.abs(slope).max() < 0.05 * np.abs(first_slope).max()


@pytest.mark.parametrize("rule", [expectation_maximisation, gradient_ascent])
def test_small_steps_of_either_rule_only_gain(rule, drawn):
    with jax.enable_x64(True):
        counts, model = jnp.asarray(drawn.counts), SwitchingGLM(S, N, "gaussian")
        params = jax.tree.map(lambda x: x.astype(float), model.init(jax.random.key(2), counts))
        _, objective = fit(rule, model, params, counts, optax.sgd(0.3), 30)
        assert (np.diff(objective) > -1e-6).all() and objective[-1] > objective[0] + 1


def test_one_step_of_either_rule_moves_the_emissions_alike(drawn):
    """Fisher's identity: the expected objective and the likelihood have one gradient at the E-step's parameters.

    Counts after the end of a shorter sequence change nothing.
    """
    with jax.enable_x64(True):
        counts, model, optimizer = jnp.asarray(drawn.counts), SwitchingGLM(S, N), optax.sgd(1.0)
        params = jax.tree.map(lambda x: x.astype(float), model.init(jax.random.key(2), counts))
        lengths, other = jnp.asarray([T, T - 20]), counts.at[1, T - 20 :].set(7)

        def moved(rule, counts):
            state = hidden_markov_start(params, optimizer, S, jax.random.key(1), transition=rule is gradient_ascent)
            return jax.jit(rule(model, optimizer, 1))(state, counts, lengths)[0].params

        expected = moved(expectation_maximisation, counts)
        assert_close(moved(expectation_maximisation, other), expected, 1e-12)
        assert_close(moved(gradient_ascent, counts), expected, 1e-12)


def test_a_state_never_entered_keeps_its_transition(drawn):
    model = SwitchingGLM(S, N)
    params = {"params": {"weight": jnp.zeros((S, N, N)), "bias": jnp.zeros(N)}}
    never = jnp.log(jnp.asarray([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    # From the uniform start state 2 is possible; emissions of weight zero rule it out.
    params["params"]["weight"] = params["params"]["weight"].at[2].set(-1e4)
    optimizer = optax.sgd(0.0)
    state = HiddenMarkovState(params, never, optimizer.init(params), jax.random.key(0))
    counts = jnp.ones((1, T, N), jnp.int32)
    state, objective = jax.jit(expectation_maximisation(model, optimizer, 1))(state, counts)
    assert np.isfinite(objective) and not np.isnan(state.log_transition).any()
    assert_close(jnp.exp(state.log_transition), jnp.exp(never), 1e-5)


def test_the_best_of_several_starts_goes_on():
    """A step that climbs by its state's slope: the steepest start wins, and every start is tried for a quarter."""
    steps = []

    def step(state, slope):
        steps.append(state.key)
        return state._replace(params=state.params + slope * state.key), state.params + slope * state.key

    starts = [HiddenMarkovState(0.0, None, None, key) for key in (1.0, 3.0, 2.0)]
    final = best_fit(step, starts, 1.0, 8)
    assert final.key == 3.0 and final.params == 24.0
    assert steps == [1.0] * 2 + [3.0] * 2 + [2.0] * 2 + [3.0] * 6


def test_states_are_matched_up_to_their_names():
    true = np.random.default_rng(0).integers(0, 4, (3, 50))
    renamed = np.asarray([2, 0, 3, 1])[true]
    found, accuracy = matched_states(true, renamed, 4)
    assert found.tolist() == [2, 0, 3, 1] and accuracy == 1.0
    renamed[0, :15] = (renamed[0, :15] + 1) % 4
    assert matched_states(true, renamed, 4)[1] == 0.9
    assert matched_states(true, np.zeros_like(true), 4)[1] == np.bincount(true.ravel()).max() / true.size


def table(folder, text, name="spikes.csv"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["spikes.csv", "spikes.csv.gz"])
def test_spike_times_become_counts(name, tmp_path):
    path = table(tmp_path, "neuron,trial,time_s\n10,1,0.05\n2,1,0.0\n2,1,0.1\n2,x,0.31\n2,x,0.39\n", name)
    counts, trials, neurons = spike_counts(path, bin_seconds=0.1)
    assert (trials, neurons) == (("1", "x"), ("2", "10")) and counts.dtype == np.int32
    assert counts.tolist() == [[[1, 1], [1, 0], [0, 0]], [[0, 0]] * 3]  # the last bin is not full
    assert spike_counts(path, bin_seconds=0.1, seconds=0.4)[0].sum() == 5


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded spike trains are not beside the repository")
def test_recorded_spike_trains():
    counts, trials, neurons = spike_counts(RECORDED / "e070528citronellal.csv.gz", bin_seconds=0.02, seconds=13)
    assert counts.shape == (15, 650, 4) and counts.sum() == 13426
    assert trials == tuple(map(str, range(1, 16))) and neurons == ("1", "2", "3", "4")
    assert spike_counts(RECORDED / "mPK.csv.gz", bin_seconds=1.0)[1] == ("bicu", "ctl")


counts = np.zeros((2, T, N), np.float32)
log_x = np.log(np.asarray([[0.2, 0.3, 0.5]]))
apply = lambda counts, **fields: SwitchingGLM(S, N, **fields).init(jax.random.key(0), counts)
BAD = {
    "negative": (lambda _: apply(counts - (np.arange(N) == 2)), "neuron 2 has the count -1.0 in bin 0 of sequence 0"),
    "fraction": (lambda _: apply(counts + 0.5 * (np.arange(N) == 1)), "neuron 1 has the count 0.5"),
    "NaN": (lambda _: apply(np.where(np.arange(N) == 3, np.nan, counts)), "neuron 3 has the count nan"),
    "short": (lambda _: apply(counts[:, :5]), "counts has 5 bins; a history of 5 bins takes at least 6"),
    "neurons": (lambda _: apply(counts[..., :3]), "counts has 3 neurons; this SwitchingGLM has 4"),
    "states": (lambda _: SwitchingGLM(0, N).init(jax.random.key(0), counts), "num_states=0"),
    "temperature": (lambda _: apply(counts, temperature=0.0), "temperature=0.0"),
    "prior": (lambda _: apply(counts, prior="laplace"), "prior='laplace'.*'one_hot'"),
    "density": (lambda _: gumbel_softmax_log_density(log_x, log_x, -1.0), "temperature=-1.0"),
    "corner": (
        lambda _: gumbel_softmax_log_density(np.asarray([-np.inf, 0.0]), log_x[0, :2], 1.0), r"x at \[0\] is 0.0",
    ),
    "simulated": (lambda _: switching_spikes(jax.random.key(0), num_sequences=0, length=9), "num_sequences=0"),
    "stay": (lambda _: switching_spikes(jax.random.key(0), num_sequences=1, length=9, stay=1.0), "stay=1.0"),
    "states of two": (lambda _: matched_states([0, 1], [0, 2], 2), "inferred has to hold states from 0 to 1"),
    "bins": (lambda _: matched_states([0, 1], [0], 2), "true has shape .2,. and inferred .1,."),
    "column": (lambda f: spike_counts(table(f, "neuron,time_s\n"), bin_seconds=0.1), "has no column trial"),
    "time": (lambda f: spike_counts(table(f, "neuron,trial,time_s\n1,1,-2\n"), bin_seconds=0.1), "line 2: time_s='-2'"),
    "no spikes": (lambda f: spike_counts(table(f, "neuron,trial,time_s\n"), bin_seconds=0.1), "holds no spikes"),
    "bin": (lambda f: spike_counts(table(f, "neuron,trial,time_s\n1,1,2\n"), bin_seconds=0.0), "bin_seconds=0.0"),
    "damaged": (lambda f: spike_counts(_cut(table(f, "neuron,trial,time_s\n", "a.gz")), bin_seconds=1.0), "is damaged"),
}  # fmt: skip


def _cut(path):
    path.write_bytes(path.read_bytes()[:-9])
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, tmp_path):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        call(tmp_path)
    assert "\n" not in str(raised.value)
