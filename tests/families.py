"""The tables of instances that laws are run over, and the one table of tolerances. Joining a table is being tested."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxseq import GLA, S4D, Attention, Mamba, monoid, ops
from jaxseq.mixers import (
    ABC,
    DSS,
    ELM,
    GRU,
    GSA,
    H3,
    HGRN,
    HGRN2,
    ICLRNN,
    KDA,
    LRU,
    LSTM,
    MLSTM,
    RGLRU,
    RWKV6,
    RWKV7,
    S4,
    S5,
    BaseConv,
    Based,
    BigBird,
    CausalOrchid,
    Comba,
    DeltaNet,
    ForgettingAttention,
    GatedDeltaNet,
    Hyena,
    KroneckerAttention,
    LeakyRNN,
    LightNet,
    Lightning,
    LinearAttention,
    LogLinearAttention,
    LongConv,
    Longformer,
    Mamba2,
    MesaNet,
    MinGRU,
    MinLSTM,
    PaTHAttention,
    Performer,
    ReBased,
    RetNet,
    Rodimus,
    SelectiveAttention,
    SubsampledAttention,
)
from jaxseq.ops.state_space import DISCRETISATIONS

#: Relative Frobenius error of each array, ‖a − b‖ / ‖b‖. Ops are measured against `sequential` in float64.
TOLERANCE = {
    "float64": 1e-12,
    "float32": 2e-6,  # mild decays
    "float32 transform": 1e-5,  # through a fast Fourier transform
    "float32 strong": 1e-5,  # log decays of −20, 0 and between
    "float32 repeated keys": 2e-4,  # what the inverse of a triangle loses where β is near 2
    "bfloat16": 1e-2,  # inputs and outputs rounded, sums in float32
    "bfloat16 gradient": 2e-2,
    "bfloat16 exchanged": 5e-4,  # bfloat16 inputs, on one device or many: what passes between devices is float32
    "mixer": 1e-5,  # float32 forms of one mixer or model, values and gradients
    "mixer strong": 5e-5,  # gradients of decays so strong that little is left of them
    "mixer bfloat16": 4e-2,  # against the same parameters in float32
}


def assert_close(actual, expected, tolerance: str | float):
    """Every leaf of `actual` is finite and within the tolerance of `expected`, of equal shape."""
    bound = TOLERANCE[tolerance] if isinstance(tolerance, str) else tolerance
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.complex128 if np.iscomplexobj(b) else np.float64) for x in (a, b))
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
        assert np.isfinite(a).all(), f"{name}: {np.size(a) - np.isfinite(a).sum()} of {a.size} entries are not finite"
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)
        assert error <= bound, f"{name}: relative error {error:.2e} exceeds {bound:.0e}"


def abstract_gpu():
    """Under which a program is traced that is lowered for a GPU that is not there: jax 0.11 asks which one it is."""
    device = AbstractDevice("NVIDIA H100", 132, "gpu")
    mesh = AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def cast(tree, dtype):
    """Floating leaves to `dtype`, complex ones to the complex type of its width."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return jax.tree.map(lambda x: jnp.asarray(x, wide if np.iscomplexobj(x) else dtype), tree)


def normals(rng: np.random.Generator, like):
    """A tree of random arrays of the shapes and kinds of `like`."""

    def draw(x):
        imaginary = 1j * rng.standard_normal(x.shape) if jnp.issubdtype(x.dtype, jnp.complexfloating) else 0
        return np.asarray(rng.standard_normal(x.shape) + imaginary)

    return jax.tree.map(draw, like)


def log_decays(rng: np.random.Generator, shape, strength: str) -> np.ndarray:
    if strength == "mild":
        return -rng.uniform(0, 0.3, shape)
    return rng.choice([-20.0, -20.0, -3.0, -0.01, 0.0], shape)


# ---- monoids: random elements with leading axes, and a state that they act on --------------------------------------


class MonoidMember(NamedTuple):
    monoid: monoid.Monoid
    elements: Callable[[np.random.Generator, tuple], Any]
    state: Callable[[np.random.Generator, tuple], Any]


def _complex(rng, shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def _softmax(rng, shape):
    value = rng.standard_normal((*shape, 3))
    hidden = rng.random(shape) < 0.2  # a masked token: it adds nothing
    return monoid.Softmax.from_token(jnp.asarray(np.where(hidden, -np.inf, 9 * rng.standard_normal(shape))), value)


def _expansion(rng, shape):
    """Numbers whose sums are exact: how a rounded one is split depends on the order."""
    return monoid.Expansion(rng.integers(-9, 9, shape) * 1.0, rng.integers(-9, 9, shape) * 2.0**-60)


PLAIN_MONOIDS = {
    "affine": MonoidMember(
        monoid.affine,
        lambda rng, s: monoid.Affine(rng.uniform(-1, 1, (*s, 4)), rng.standard_normal((*s, 4))),
        lambda rng, s: rng.standard_normal((*s, 4)),
    ),
    "affine complex": MonoidMember(
        monoid.affine,
        lambda rng, s: monoid.Affine(0.6 * _complex(rng, (*s, 4)), _complex(rng, (*s, 4))),
        lambda rng, s: _complex(rng, (*s, 4)),
    ),
    "matrix affine": MonoidMember(
        monoid.matrix_affine,
        lambda rng, s: monoid.MatrixAffine(rng.uniform(-0.5, 0.5, (*s, 3, 3)), rng.standard_normal((*s, 3))),
        lambda rng, s: rng.standard_normal((*s, 3)),
    ),
    "outer product": MonoidMember(
        monoid.outer_product,
        lambda rng, s: monoid.OuterProduct.from_token(
            log_decays(rng, (*s, 3), "strong"), rng.standard_normal((*s, 3)), rng.standard_normal((*s, 2))
        ),
        lambda rng, s: rng.standard_normal((*s, 3, 2)),
    ),
    "softmax": MonoidMember(monoid.softmax, _softmax, _softmax),
    "expansion": MonoidMember(
        monoid.expansion,
        _expansion,
        _expansion,
    ),
    "runs": MonoidMember(
        monoid.runs,
        lambda rng, s: monoid.Runs(rng.random(s), rng.integers(-1, 3, s), rng.standard_normal((*s, 3, 2))),
        lambda rng, s: rng.standard_normal((*s, 3, 2)),
    ),
    "matrix map": MonoidMember(
        monoid.matrix_map,
        lambda rng, s: monoid.MatrixMap(rng.uniform(-0.5, 0.5, (*s, 3, 3)), rng.standard_normal((*s, 3, 2))),
        lambda rng, s: rng.standard_normal((*s, 3, 2)),
    ),
    "log-sum-exp": MonoidMember(
        monoid.log_sum_exp,
        lambda rng, s: 3 * rng.standard_normal((*s, 3, 3)),
        lambda rng, s: 3 * rng.standard_normal((*s, 3)),
    ),
    "index map": MonoidMember(
        monoid.index_map, lambda rng, s: rng.integers(0, 4, (*s, 4)), lambda rng, s: rng.integers(0, 4, s)
    ),
    "log affine": MonoidMember(
        monoid.log_affine,
        lambda rng, s: monoid.LogAffine(3 * rng.standard_normal((*s, 4)), 3 * rng.standard_normal((*s, 4))),
        lambda rng, s: 3 * rng.standard_normal((*s, 4)),
    ),
    "max affine": MonoidMember(
        monoid.max_affine,
        lambda rng, s: monoid.LogAffine(3 * rng.standard_normal((*s, 4)), 3 * rng.standard_normal((*s, 4))),
        lambda rng, s: 3 * rng.standard_normal((*s, 4)),
    ),
    "max-plus": MonoidMember(
        monoid.max_plus,
        lambda rng, s: 3 * rng.standard_normal((*s, 3, 3)),
        lambda rng, s: 3 * rng.standard_normal((*s, 3)),
    ),
}


def _segmented(member: MonoidMember) -> MonoidMember:
    elements = lambda rng, s: monoid.Segmented(jnp.asarray(rng.random(s) < 0.3), member.elements(rng, s))
    empty = _forget_all if member.monoid is monoid.softmax else monoid.zeros
    return MonoidMember(monoid.segmented(member.monoid, empty), elements, member.state)


def _forget_all(state):
    """The empty average: what no token has entered."""
    return monoid.softmax.identity(state)


MONOIDS = PLAIN_MONOIDS | {f"segmented {name}": _segmented(member) for name, member in PLAIN_MONOIDS.items()}

# ---- ops: `call(inputs, segment_ids, impl) -> (out, final)` on a dict of float64 arrays -----------------------------

CHUNK = 4  # the chunk size under test, wherever an op has one


class OpMember(NamedTuple):
    inputs: Callable[[np.random.Generator, int, str], dict[str, np.ndarray]]  # (rng, T, strength of the decay)
    call: Callable
    forms: tuple[str, ...] = ("sequential", "parallel", "chunked")
    sweep: bool = False  # run every length, not only an odd one
    segments: bool = True
    float32: str = "float32"  # tolerance with mild decays
    moving: tuple[str, ...] = ()  # the inputs with a time axis, for feeding a sequence in parts
    whole: bool = False  # refuses time that is split over devices
    slow: bool = False  # by the code of another member: its forms are slow tests

    @property
    def fast(self) -> tuple[str, ...]:
        """The forms to train with: the last one that XLA compiles, and a kernel."""
        return tuple(form for form in self.forms if form != "pallas")[-1:] + ("pallas",) * ("pallas" in self.forms)


def _recurrence_inputs(rng, T, strength, complex_=False):
    draw = _complex if complex_ else lambda rng, shape: rng.standard_normal(shape)
    decay = np.exp(log_decays(rng, (2, T, 3), strength) + 1j * complex_ * rng.uniform(-3, 3, (2, T, 3)))
    decay = decay if complex_ else decay.real
    return dict(decay=decay, inputs=draw(rng, (2, T, 3)), initial_state=draw(rng, (2, 3)))


def _recurrence(inputs, segment_ids, impl, **options):
    decay, x, initial = (inputs[name] for name in ("decay", "inputs", "initial_state"))
    options |= {"initial_state": initial, "segment_ids": segment_ids, "impl": impl, "chunk_size": CHUNK}
    return ops.linear_recurrence(decay, x, **options)


def _gla_inputs(rng, T, strength, decay="B T H K", bonus=False, key_heads=2):
    B, H, K, V = 2, 2, 4, 3
    shape = {"B T H K": (B, T, key_heads, K), "B T H V": (B, T, H, V), "B T H": (B, T, H), "H": (H,)}.get(decay)
    inputs = dict(query=(B, T, key_heads, K), key=(B, T, key_heads, K), value=(B, T, H, V), initial_state=(B, H, K, V))
    inputs = {name: rng.standard_normal(s) for name, s in inputs.items()}
    inputs |= {"log_decay": log_decays(rng, shape, strength)} if shape else {}
    return inputs | ({"bonus": rng.standard_normal((H, K))} if bonus else {})


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _delta_inputs(rng, T, strength, decay=None, key_heads=2):
    inputs = _gla_inputs(rng, T, strength, decay, key_heads=key_heads)
    return inputs | {"key": _unit(inputs["key"]), "beta": rng.uniform(0, 2, inputs["value"].shape[:3])}


def _dplr_inputs(rng, T, strength, decay="B T H K"):
    """A transition that grows nothing: unit a, and b against it."""
    inputs = _gla_inputs(rng, T, strength, decay)
    a = _unit(rng.standard_normal(inputs["key"].shape))
    return inputs | {"a": a, "b": -rng.uniform(0, 1, a.shape) * a}


def _matrix_state(op, inputs, segment_ids, impl):
    return op(**inputs, segment_ids=segment_ids, impl=impl, chunk_size=CHUNK)


def _selective_inputs(rng, T, strength, shape=("B", "T", "N"), complex_=False):
    sizes = dict(B=2, T=T, D=4, G=2, N=3)
    draw = _complex if complex_ else lambda rng, shape: rng.standard_normal(shape)
    B, C = (draw(rng, tuple(sizes[a] for a in shape)) for _ in range(2))
    A = -rng.uniform(0.5, 1.5, (4, 3)) + 1j * complex_ * rng.uniform(-3, 3, (4, 3))
    x, dt = rng.standard_normal((2, T, 4)), -log_decays(rng, (2, T, 4), strength)
    A = A if complex_ else A.real
    return dict(x=x, dt=dt, A=A, B=B, C=C, D=rng.standard_normal(4), initial_state=draw(rng, (2, 4, 3)))


def _selective(inputs, segment_ids, impl):
    return ops.selective_scan(**inputs, segment_ids=segment_ids, impl=impl, chunk_size=CHUNK)


def _state_space_inputs(rng, T, strength):
    log_A = log_decays(rng, (3, 2), strength) + 1j * rng.uniform(-3, 3, (3, 2))
    B, C = _complex(rng, (3, 2)), _complex(rng, (3, 2))
    return dict(u=rng.standard_normal((2, T, 3)), log_A=log_A, B=B, C=C, initial_state=_complex(rng, (2, 3, 2)))


def _state_space(inputs, segment_ids, impl):
    return ops.diagonal_state_space(**inputs, segment_ids=segment_ids, impl=impl)


def _mimo_inputs(rng, T, strength):
    """Decays of the tokens, and gains for all of them."""
    decay = np.exp(log_decays(rng, (2, T, 4), strength) + 1j * rng.uniform(-3, 3, (2, T, 4)))
    B, C, gain = _complex(rng, (4, 3)), _complex(rng, (2, 4)), _complex(rng, (2, 1, 4))
    return dict(u=rng.standard_normal((2, T, 3)), decay=decay, B=B, C=C, gain=gain, initial_state=_complex(rng, (2, 4)))


def _mimo(inputs, segment_ids, impl):
    return ops.mimo_state_space(**inputs, segment_ids=segment_ids, impl=impl)


def _dplr_state_space_inputs(rng, T, strength):
    Lambda = log_decays(rng, (3, 4), strength) - 0.3 + 1j * rng.uniform(-3, 3, (3, 4))
    P, B, C = 0.5 * _complex(rng, (3, 2, 4)), _complex(rng, (3, 4)), _complex(rng, (3, 4))
    dt = rng.uniform(0.1, 2, 3)
    return dict(
        u=rng.standard_normal((2, T, 3)), Lambda=Lambda, P=P, B=B, C=C, dt=dt, initial_state=_complex(rng, (2, 3, 4))
    )


def _dplr_state_space(inputs, segment_ids, impl):
    return ops.dplr_state_space(**inputs, segment_ids=segment_ids, impl=impl)


def _attention_inputs(rng, T, strength, groups=2):
    scale = 1 if strength == "mild" else 30  # a logit in the hundreds is attention's strong gate
    shapes = dict(query=(2, T, 4, 6), key=(2, T, groups, 6), value=(2, T, groups, 5))
    return {name: (scale if name == "query" else 1) * rng.standard_normal(s) for name, s in shapes.items()}


def _fading_inputs(rng, T, strength):
    return _attention_inputs(rng, T, "mild") | {"log_decay": log_decays(rng, (2, T, 4), strength)}


def _span_inputs(rng, T, strength):
    """Spans of each query; those of `strong` also stop decays short."""
    spans = rng.uniform(0, 9, (2, T, 4))
    return (_attention_inputs if strength == "mild" else _fading_inputs)(rng, T, strength) | {"span": spans}


def _attention(inputs, segment_ids, impl, **options):
    return ops.softmax_attention(**inputs, segment_ids=segment_ids, impl=impl, chunk_size=CHUNK, **options), ()


def _path_inputs(rng, T, strength):
    """Reflections between none and whole ones; the strong ones are whole, of few directions."""
    inputs = _attention_inputs(rng, T, "mild") | {"log_decay": log_decays(rng, (2, T, 4), strength)}
    directions, beta = _unit(rng.standard_normal((2, T, 2, 6))), rng.uniform(0, 2, (2, T, 2))
    if strength == "strong":
        directions, beta = directions[:, np.arange(T) % 3], np.full_like(beta, 2.0)
    return inputs | {"direction": directions, "beta": beta}


def _path(inputs, segment_ids, impl):
    return ops.path_attention(**inputs, segment_ids=segment_ids, impl=impl, chunk_size=CHUNK), ()


def _log_linear_inputs(rng, T, strength):
    inputs = _gla_inputs(rng, T, strength, "B T H", key_heads=1)
    start = {"sums": rng.standard_normal((2, 2, 3, 4, 3)), "tokens": np.array([0.0, 5.0])}
    return inputs | {"initial_state": start, "level_scales": rng.random((2, T, 2, 4))}


def _log_linear(inputs, segment_ids, impl):
    """The count of tokens goes in and out as a number like the others."""
    start = inputs["initial_state"]
    state = ops.LogLinearState(start["sums"], start["tokens"].astype(jnp.int32))
    inputs = inputs | {"initial_state": state, "segment_ids": segment_ids}
    o, final = ops.log_linear_attention(**inputs, impl=impl, chunk_size=CHUNK)
    return o, {"sums": final.sums, "tokens": final.tokens.astype(final.sums.dtype)}


def _log_matmul_inputs(rng, T, strength):
    """Weights of zero among the strong ones, where no two paths weigh the same."""
    matrices = log_decays(rng, (2, T, 3, 3), strength) + 0.1 * rng.standard_normal((2, T, 3, 3))
    matrices[..., [0, 1], [1, 2]] -= np.inf if strength == "strong" else 0
    return dict(log_matrices=matrices, initial_state=rng.standard_normal((2, 3)))


def _log_matmul(inputs, segment_ids, impl, **options):
    return ops.log_matmul(**inputs, segment_ids=segment_ids, impl=impl, **options)


def _log_recurrence_inputs(rng, T, strength):
    inputs = (1 if strength == "mild" else 100) * rng.standard_normal((2, T, 3))
    decay = log_decays(rng, (2, T, 3), strength)
    return dict(log_decay=decay, log_inputs=inputs, initial_state=rng.standard_normal((2, 3)))


def _log_recurrence(inputs, segment_ids, impl, **options):
    return ops.log_recurrence(**inputs, segment_ids=segment_ids, impl=impl, **options)


def _nonlinear_inputs(rng, T, strength):
    """A state of two arrays, and a gate that opens and shuts; no cell that grows."""
    x = (1 if strength == "mild" else 30) * rng.standard_normal((2, T, 3))
    W, V = 0.4 * rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
    return dict(x=x, W=W, V=V, initial_state=rng.standard_normal((2, 3)))


def _nonlinear(inputs, segment_ids, impl, **options):
    W, V = inputs["W"], inputs["V"]

    def cell(state, x):
        gate = jax.nn.sigmoid((x @ V).astype(state["h"].dtype))
        c = gate * state["c"] + (1 - gate) * jnp.tanh(state["h"] @ W.astype(gate.dtype) + x.astype(gate.dtype))
        return {"c": c, "h": jnp.tanh(c)}

    start = {"c": inputs["initial_state"], "h": jnp.tanh(inputs["initial_state"])}
    options |= dict(segment_ids=segment_ids, impl=impl)
    states, final = ops.nonlinear_recurrence(cell, inputs["x"], start, **options)
    return states["h"], final["c"]


def _slot_inputs(rng, T, strength):
    inputs = _gla_inputs(rng, T, strength) | {"write": rng.uniform(0, 1, (2, T, 2, 5))}
    inputs |= {"log_decay": log_decays(rng, (2, T, 2, 5), strength)}
    return inputs | {"initial_state": {"keys": _normal(rng, 2, 2, 4, 5), "values": _normal(rng, 2, 2, 5, 3)}}


def _slots(inputs, segment_ids, impl):
    inputs = inputs | {"initial_state": ops.SlotState(**inputs["initial_state"])}
    o, final = _matrix_state(ops.slot_attention, inputs, segment_ids, impl)
    return o, final._asdict()


def _mesa_inputs(rng, T, strength):
    """A system that is not near singular: unit keys, and a ridge of about one."""
    inputs = _delta_inputs(rng, T, strength, "B T H") | {"ridge": rng.uniform(0.5, 1.5, (2, 4))}
    return inputs | {"initial_state": {"keys": np.zeros((2, 2, 4, 4)), "values": _normal(rng, 2, 2, 4, 3)}}


def _mesa(inputs, segment_ids, impl):
    inputs = inputs | {"initial_state": ops.MesaState(**inputs["initial_state"])}
    o, final = _matrix_state(ops.mesa, inputs, segment_ids, impl)
    return o, final._asdict()


def _product_inputs(rng, T, strength):
    inputs = _delta_inputs(rng, T, strength, "B T H")
    three = lambda x: x[:, :, None].repeat(3, axis=2) * rng.uniform(0.5, 1, (*x.shape[:2], 3, *x.shape[2:]))
    return inputs | {
        "key": _unit(_normal(rng, 2, T, 3, 2, 4)),
        "value": three(inputs["value"]),
        "beta": three(inputs["beta"]),
    }


def _normal(rng, *shape):
    return rng.standard_normal(shape)


_recurrent = dict(moving=("decay", "inputs"), forms=("sequential", "parallel", "chunked", "in_place", "pallas"))
_scans = ("sequential", "in_rows", "parallel", "chunked")
_kernel = ("sequential", "parallel", "chunked", "pallas")
_composed = ("sequential", "chunked")  # of ops whose other forms are tested by themselves
_tokens = ("query", "key", "value", "log_decay", "beta", "a", "b")
_linear, _delta, _dplr = (
    dict(call=partial(_matrix_state, op), moving=_tokens, forms=_kernel)
    for op in (ops.gated_linear_attention, ops.delta_rule, ops.dplr_recurrence)
)

OPS = {
    "linear_recurrence": OpMember(_recurrence_inputs, _recurrence, sweep=True, **_recurrent),
    "linear_recurrence reverse": OpMember(_recurrence_inputs, partial(_recurrence, reverse=True), **_recurrent),
    "linear_recurrence complex": OpMember(partial(_recurrence_inputs, complex_=True), _recurrence, **_recurrent),
    "gla per channel": OpMember(_gla_inputs, sweep=True, **_linear),
    "gla per head": OpMember(partial(_gla_inputs, decay="B T H"), sweep=True, **_linear),
    "gla fixed decay": OpMember(
        partial(_gla_inputs, decay="H"),
        **_linear | dict(moving=("query", "key", "value"), forms=_kernel[:-1]),
        slow=True,
    ),
    "gla no decay": OpMember(partial(_gla_inputs, decay=None), **_linear, slow=True),
    "gla bonus": OpMember(partial(_gla_inputs, bonus=True), **_linear),
    "gla bonus grouped keys": OpMember(
        partial(_gla_inputs, bonus=True, key_heads=1), **_linear | dict(forms=_kernel[:-1]), slow=True
    ),
    "gla per value": OpMember(
        partial(_gla_inputs, decay="B T H V"),
        **_linear | dict(call=partial(_matrix_state, partial(ops.gated_linear_attention, decay_axis="value"))),
        sweep=True,
    ),
    "gla grouped keys": OpMember(partial(_gla_inputs, key_heads=1), **_linear | dict(forms=_kernel[:-1])),
    "delta_rule": OpMember(_delta_inputs, **_delta, slow=True),
    "delta_rule per head": OpMember(partial(_delta_inputs, decay="B T H"), **_delta),
    "delta_rule per channel": OpMember(partial(_delta_inputs, decay="B T H K"), sweep=True, **_delta),
    "delta_rule grouped keys": OpMember(
        partial(_delta_inputs, decay="B T H", key_heads=1), **_delta | dict(forms=_kernel[:-1])
    ),
    "dplr_recurrence": OpMember(_dplr_inputs, sweep=True, **_dplr),
    "dplr_recurrence per head": OpMember(partial(_dplr_inputs, decay="B T H"), **_dplr, slow=True),
    "dplr_recurrence no decay": OpMember(partial(_dplr_inputs, decay=None), **_dplr, slow=True),
    "delta_product": OpMember(_product_inputs, partial(_matrix_state, ops.delta_product), _composed, moving=_tokens),
    "slot_attention": OpMember(_slot_inputs, _slots, _composed, moving=(*_tokens, "write")),
    "mesa": OpMember(_mesa_inputs, _mesa, _composed, moving=_tokens),
    "selective_scan": OpMember(
        _selective_inputs, _selective, (*_scans, "pallas"), sweep=True, moving=("x", "dt", "B", "C")
    ),
    "selective_scan groups": OpMember(
        partial(_selective_inputs, shape=("B", "T", "G", "N")), _selective, _scans, moving=("x", "dt", "B", "C")
    ),
    "selective_scan constant": OpMember(
        partial(_selective_inputs, shape=("D", "N")), _selective, _scans, moving=("x", "dt")
    ),
    "selective_scan complex": OpMember(
        partial(_selective_inputs, complex_=True), _selective, _scans, moving=("x", "dt", "B", "C")
    ),
    "diagonal_state_space": OpMember(_state_space_inputs, _state_space, moving=("u",)),
    "diagonal_state_space convolution": OpMember(
        _state_space_inputs,
        _state_space,
        forms=("sequential", "convolution"),
        segments=False,
        moving=("u",),
        sweep=True,
        float32="float32 transform",
    ),
    "mimo_state_space": OpMember(_mimo_inputs, _mimo, moving=("u", "decay")),
    "dplr_state_space": OpMember(_dplr_state_space_inputs, _dplr_state_space, forms=("sequential",), moving=("u",)),
    "dplr_state_space convolution": OpMember(
        _dplr_state_space_inputs,
        _dplr_state_space,
        forms=("sequential", "convolution"),
        segments=False,
        moving=("u",),
        sweep=True,
        float32="float32 transform",
    ),
    "path_attention": OpMember(_path_inputs, _path, sweep=True, whole=True),
    "log_linear_attention": OpMember(
        _log_linear_inputs, _log_linear, sweep=True, moving=("query", "key", "value", "level_scales", "log_decay")
    ),
    "log_matmul": OpMember(_log_matmul_inputs, _log_matmul, sweep=True, moving=("log_matrices",), whole=True),
    "log_matmul reverse": OpMember(_log_matmul_inputs, partial(_log_matmul, reverse=True), whole=True),
    "log_matmul max_plus": OpMember(_log_matmul_inputs, partial(_log_matmul, semiring="max_plus"), whole=True),
    "log_recurrence": OpMember(_log_recurrence_inputs, _log_recurrence, sweep=True, moving=("log_decay", "log_inputs")),
    "log_recurrence max_plus": OpMember(
        _log_recurrence_inputs, partial(_log_recurrence, semiring="max_plus"), moving=("log_decay", "log_inputs")
    ),
    "nonlinear_recurrence": OpMember(
        _nonlinear_inputs, _nonlinear, forms=("sequential", "parallel"), sweep=True, moving=("x",)
    ),
    "nonlinear_recurrence diagonal": OpMember(
        _nonlinear_inputs,
        partial(_nonlinear, jacobian="diagonal", block_size=CHUNK),
        forms=("sequential", "parallel"),
        moving=("x",),
    ),
    "softmax_attention": OpMember(_attention_inputs, _attention, _kernel, sweep=True),
    "softmax_attention window": OpMember(_attention_inputs, partial(_attention, window=5), _kernel),
    "softmax_attention softcap": OpMember(
        _attention_inputs, partial(_attention, logit_softcap=2.0, window=20), _kernel
    ),
    "softmax_attention decay": OpMember(_fading_inputs, _attention, sweep=True),
    "softmax_attention decay window": OpMember(_fading_inputs, partial(_attention, window=5)),
    "softmax_attention span": OpMember(_span_inputs, partial(_attention, ramp=3.0), slow=True),
    "softmax_attention span window": OpMember(_span_inputs, partial(_attention, ramp=3.0, window=5)),
    "softmax_attention both ways": OpMember(
        partial(_attention_inputs, groups=1), partial(_attention, causal=False), _kernel
    ),
}


def segments(rng: np.random.Generator, batch: int, T: int) -> np.ndarray:
    """Segment ids of random lengths, other ones in every row."""
    return np.cumsum(rng.random((batch, T)) < 0.15, axis=1).astype(np.int32)


# ---- mixers ---------------------------------------------------------------------------------------------------------

WIDTH = 8  # d_model of every mixer under test


class MixerMember(NamedTuple):
    build: Callable[..., nn.Module]  # the fields given go on top
    recurrent: bool = True  # the size of the state does not depend on max_length
    extreme: dict[str, float] = {}  # parameters set so: gates that forget everything at once
    slow: bool = False  # like another mixer that runs every law by default: slow tests, but for the values
    cheap: bool = False  # one more setting of a mixer that runs every law: values only
    reach: int = 1000  # tokens a query can see
    gradient: str | float | None = "mixer"  # tolerance of gradients; None: parts have others, at a bound
    packs: bool = True  # a sequence in a row with others sees what it would alone
    causal_to_rounding: bool = False  # always through a transform, which mixes all of time
    same_state: bool = True  # steps leave the state that a call does, not another form of it
    whole: bool = False  # refuses time that is split over devices
    exact: dict[str, Any] = {}  # fields under which causality holds to the bit: a transform mixes all of time


_gla_gate = {"decay_up/bias": -1e4}  # log decay −625

MIXERS = {
    "GLA": MixerMember(partial(GLA, WIDTH, num_heads=2, chunk_size=CHUNK, impl="chunked"), extreme=_gla_gate),
    "GLA conv grouped": MixerMember(
        partial(GLA, WIDTH, num_heads=2, num_kv_heads=1, conv_window=4, chunk_size=CHUNK, expand_k=1.0),
        extreme=_gla_gate,
        slow=True,
    ),
    "DeltaNet": MixerMember(
        partial(DeltaNet, WIDTH, num_heads=2, chunk_size=CHUNK), extreme={"beta_proj/kernel": 1e3}, slow=True
    ),
    "GLA ungated": MixerMember(
        partial(GLA, WIDTH, num_heads=2, output_gate=False, chunk_size=CHUNK), extreme=_gla_gate, cheap=True
    ),
    "DeltaNet gated": MixerMember(
        partial(DeltaNet, WIDTH, num_heads=2, output_gate=True, chunk_size=CHUNK), cheap=True
    ),
    "GLA scalar": MixerMember(
        partial(GLA, WIDTH, gate="scalar", num_heads=4, num_kv_heads=2, expand_k=1.0, chunk_size=CHUNK), cheap=True
    ),
    "GLA fixed": MixerMember(partial(GLA, WIDTH, gate="fixed", num_heads=2, chunk_size=CHUNK), cheap=True),
    "GLA none": MixerMember(partial(GLA, WIDTH, gate="none", num_heads=2, chunk_size=CHUNK), cheap=True),
    "GatedDeltaNet": MixerMember(
        partial(
            GatedDeltaNet,
            WIDTH,
            num_heads=1,
            num_value_heads=2,
            expand_k=0.5,
            expand_v=1.0,
            chunk_size=CHUNK,
            negative_eigenvalues=True,
        ),
        extreme={"A_log": 20.0},
        gradient="mixer strong",
        slow=True,
    ),
    "GatedDeltaNet householders": MixerMember(
        partial(
            GatedDeltaNet, WIDTH, num_heads=1, num_value_heads=2, expand_v=1.0, num_householders=2, chunk_size=CHUNK
        ),
        extreme={"A_log": 20.0},
        gradient="mixer strong",
        slow=True,
    ),
    "LogLinearAttention": MixerMember(
        partial(LogLinearAttention, WIDTH, num_heads=2, num_levels=4, chunk_size=CHUNK),
        extreme={"A_log": 20.0},
        slow=True,
    ),
    "Comba": MixerMember(
        partial(Comba, WIDTH, num_heads=2, chunk_size=CHUNK),
        extreme={"A_log": 20.0},
        gradient="mixer strong",
        slow=True,
    ),
    "Comba value heads": MixerMember(
        partial(Comba, WIDTH, num_heads=1, num_value_heads=2, chunk_size=CHUNK), cheap=True
    ),
    "LightNet": MixerMember(
        partial(LightNet, WIDTH, num_heads=2, gate_rank=3, chunk_size=CHUNK), extreme={"k_proj/kernel": 1e4}, slow=True
    ),
    "KDA": MixerMember(partial(KDA, WIDTH, num_heads=2, chunk_size=CHUNK), extreme={"A_log": 20.0}, slow=True),
    "DeltaProduct": MixerMember(
        partial(GatedDeltaNet, WIDTH, num_heads=2, forget_gate=False, num_householders=2, chunk_size=CHUNK), cheap=True
    ),
    "KDA bounded": MixerMember(
        partial(
            KDA, WIDTH, num_heads=1, num_value_heads=2, min_log_decay=-5.0, negative_eigenvalues=True, chunk_size=CHUNK
        ),
        cheap=True,
    ),
    "KDA channel gates": MixerMember(
        partial(KDA, WIDTH, num_heads=1, num_value_heads=2, channel_gates=True, chunk_size=CHUNK),
        extreme={"A_log": 20.0},
        slow=True,
    ),
    "Rodimus": MixerMember(
        partial(Rodimus, WIDTH, key_width=4, gate_rank=2, chunk_size=CHUNK),
        extreme={"decay_proj/kernel": 1e4, "temperature_proj/bias": 10.0},
        slow=True,
    ),
    "RetNet": MixerMember(
        partial(RetNet, WIDTH, num_heads=2, chunk_size=CHUNK),
        extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0},
        slow=True,
    ),
    "RetNet conv grouped": MixerMember(
        partial(RetNet, WIDTH, num_heads=2, num_kv_heads=1, conv_window=4, chunk_size=CHUNK), cheap=True
    ),
    "HGRN": MixerMember(partial(HGRN, WIDTH, chunk_size=CHUNK), extreme={"decay_proj/kernel": 1e4}, slow=True),
    "HGRN bounded conv": MixerMember(partial(HGRN, WIDTH, lower_bound=0.3, conv_window=4), cheap=True),
    "HGRN2": MixerMember(
        partial(HGRN2, WIDTH, num_heads=2, chunk_size=CHUNK), extreme={"decay_proj/kernel": 1e4}, slow=True
    ),
    "HGRN2 bounded conv": MixerMember(
        partial(HGRN2, WIDTH, num_heads=2, lower_bound=tuple(n / 8 for n in range(WIDTH)), conv_window=4), cheap=True
    ),
    "LinearAttention": MixerMember(
        partial(LinearAttention, WIDTH, num_heads=2, expand_v=2.0, norm_eps=1e-5, chunk_size=CHUNK),
        extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0},
        slow=True,
    ),
    "LinearAttention grouped": MixerMember(
        partial(LinearAttention, WIDTH, num_heads=2, num_kv_heads=1, feature_map="hedgehog"), cheap=True
    ),
    "Based": MixerMember(
        partial(Based, WIDTH, num_heads=2, feature_width=3, chunk_size=CHUNK),
        extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0},
        slow=True,
    ),
    # Weights that are all near zero, over an ε nearer still, are rounding alone.
    "ReBased": MixerMember(
        partial(ReBased, WIDTH, num_heads=2, feature_width=4, epsilon=0.01, chunk_size=CHUNK),
        extreme={"q_proj/kernel": 30.0, "norm/scale": 1e3},
        slow=True,
    ),
    "Lightning": MixerMember(
        partial(Lightning, WIDTH, num_heads=2, layer=1, num_layers=5, chunk_size=CHUNK),
        extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0},
        slow=True,
    ),
    "MesaNet": MixerMember(
        partial(MesaNet, WIDTH, num_heads=2, chunk_size=CHUNK),
        extreme={"decay_proj/bias": -1e4, "beta_proj/bias": 1e4},
        slow=True,
    ),
    "ABC": MixerMember(
        partial(ABC, WIDTH, num_heads=2, num_slots=3, conv_window=4, chunk_size=CHUNK),
        extreme={"slot_proj/kernel": 1e4, "q_proj/kernel": 30.0},
        slow=True,
    ),
    "GSA": MixerMember(
        partial(GSA, WIDTH, num_heads=2, num_slots=3, chunk_size=CHUNK),
        extreme={"decay_proj/kernel": -1e4, "q_proj/kernel": 30.0},
        slow=True,
    ),
    "GSA conv grouped": MixerMember(
        partial(GSA, WIDTH, num_heads=4, num_kv_heads=2, num_slots=3, conv_window=4, chunk_size=CHUNK), cheap=True
    ),
    "RWKV6": MixerMember(
        partial(RWKV6, WIDTH, num_heads=2, mix_rank=2, decay_rank=2, chunk_size=CHUNK),
        extreme={"decay_up/bias": 6.0},
        slow=True,
    ),
    "RWKV7": MixerMember(
        partial(RWKV7, WIDTH, num_heads=2, decay_rank=2, a_rank=2, gate_rank=2, chunk_size=CHUNK),
        extreme={"decay_up/bias": 1e4, "k_proj/kernel": 1e3},
        gradient="mixer strong",
        slow=True,
    ),
    "MLSTM": MixerMember(
        partial(MLSTM, WIDTH, num_heads=2, chunk_size=CHUNK),
        extreme={"input_gate/bias": 1e3, "forget_gate/bias": -1e4},
        gradient="mixer strong",  # of gates that mostly cancel in a mean
        slow=True,
    ),
    "S4D": MixerMember(partial(S4D, WIDTH, state_size=4), extreme={"log_dt": 6.0}, exact={"impl": "chunked"}),
    "Mamba": MixerMember(
        partial(Mamba, WIDTH, state_size=4, chunk_size=CHUNK, impl="chunked"), extreme={"dt_bias": 100.0}
    ),
    "Mamba, B alone": MixerMember(partial(Mamba, WIDTH, state_size=4, selective=("B",), chunk_size=CHUNK)),
    "Mamba2": MixerMember(
        partial(Mamba2, WIDTH, state_size=4, num_heads=4, num_groups=2, chunk_size=CHUNK),
        extreme={"dt_bias": 100.0},
        slow=True,
    ),
    "Mamba2 limited": MixerMember(
        partial(Mamba2, WIDTH, state_size=4, num_heads=2, dt_limit=(0.01, 0.05), channel_skip=True, use_bias=True),
        cheap=True,
    ),
    "S4": MixerMember(
        partial(S4, WIDTH, state_size=4),
        gradient="mixer strong",
        extreme={"log_dt": 6.0},
        exact={"impl": "sequential"},
        slow=True,
    ),
    "S4 shared": MixerMember(
        partial(S4, WIDTH, state_size=8, measure="legt", num_copies=2, rate=2.0),
        cheap=True,
        gradient=1e-3,  # the whole by transforms, parts by steps, of a stiff measure
    ),
    "DSS": MixerMember(
        partial(DSS, WIDTH, state_size=3), extreme={"log_dt": 6.0}, exact={"impl": "chunked"}, slow=True
    ),
    "DSS softmax": MixerMember(partial(DSS, WIDTH, state_size=3, version="softmax", length=9), cheap=True),
    "DSS clip": MixerMember(partial(DSS, WIDTH, state_size=3, version="clip", separate_dt=False), cheap=True),
    "DSS no scale": MixerMember(partial(DSS, WIDTH, state_size=3, version="exp_no_scale"), cheap=True),
    "S5": MixerMember(partial(S5, WIDTH, state_size=8, num_blocks=2), extreme={"log_step": 6.0}, slow=True),
    "S5 bilinear": MixerMember(
        partial(S5, WIDTH, state_size=8, discretisation="bilinear", clip=True, rate=2.0, output="full_glu"), cheap=True
    ),
    "S5 whole spectrum": MixerMember(partial(S5, WIDTH, state_size=4, conjugate=False, output="half_glu2"), cheap=True),
    "H3": MixerMember(
        partial(H3, WIDTH, head_width=2, state_size=4, shift_size=3),
        extreme={"ssm/log_dt": 6.0},
        gradient="mixer strong",
        exact={"impl": "chunked"},
        slow=True,
    ),
    "CausalOrchid": MixerMember(
        partial(CausalOrchid, WIDTH, num_lags=3, window=2, chunk_size=CHUNK), extreme={"log_rate": 6.0}, slow=True
    ),
    # A transform mixes all of time, and steps leave what has been given so far in other places than a call does.
    "Hyena": MixerMember(
        partial(Hyena, WIDTH, max_length=50, order=3, filter_width=4),
        same_state=False,
        causal_to_rounding=True,
        slow=True,
    ),
    "BaseConv": MixerMember(partial(BaseConv, WIDTH), slow=True, reach=3),
    "BaseConv long": MixerMember(
        partial(BaseConv, WIDTH, kernel_size=None, max_length=50), slow=True, same_state=False, causal_to_rounding=True
    ),
    "LongConv": MixerMember(
        partial(LongConv, WIDTH, max_length=50, squash=0.1), slow=True, same_state=False, causal_to_rounding=True
    ),
    "LRU": MixerMember(partial(LRU, WIDTH, state_size=4), extreme={"nu_log": 6.0}, slow=True),
    # Λ so low that nothing decays: √(1 − a²) has no slope there that is finite.
    "RGLRU": MixerMember(partial(RGLRU, WIDTH, num_heads=2), extreme={"Lambda": -100.0}, slow=True),
    "MinGRU": MixerMember(partial(MinGRU, WIDTH, expand=2), extreme={"gate_proj/bias": 1e4}, slow=True),
    "MinLSTM": MixerMember(
        partial(MinLSTM, WIDTH), extreme={"forget_proj/bias": -1e4, "input_proj/bias": -1e4}, slow=True
    ),
    "LSTM": MixerMember(
        partial(LSTM, WIDTH), extreme={"in_proj/bias": -1e4, "recurrent_kernel": 30.0}, gradient="mixer strong"
    ),
    "ELM": MixerMember(
        partial(ELM, WIDTH, num_memory=6, num_branches=2, max_tau=20.0, learn_tau=True),
        extreme={"synapses": 1e4},
        gradient="mixer strong",
        slow=True,
    ),
    "LeakyRNN": MixerMember(
        partial(LeakyRNN, WIDTH), extreme={"in_proj/bias": -1e4, "tau": 1e4}, gradient="mixer strong", slow=True
    ),
    "ICLRNN": MixerMember(
        partial(ICLRNN, WIDTH, hidden_sizes=(24, 24)), extreme={"layer_0_bias": 1e4}, gradient="mixer strong", slow=True
    ),
    "GRU": MixerMember(
        partial(GRU, WIDTH),
        extreme={"in_proj/bias": -1e4, "recurrent_kernel": 30.0},
        gradient="mixer strong",
        slow=True,
    ),
    "Attention": MixerMember(
        partial(Attention, WIDTH, num_heads=2), recurrent=False, extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0}
    ),
    "Attention window grouped": MixerMember(
        partial(Attention, WIDTH, num_heads=4, num_kv_heads=2, window=4), extreme={"q_proj/kernel": 30.0}, reach=4
    ),
    "ForgettingAttention": MixerMember(
        partial(ForgettingAttention, WIDTH, num_heads=4, num_kv_heads=2),
        recurrent=False,
        extreme={"q_proj/kernel": 30.0, "forget_proj/kernel": 300.0},
        slow=True,
    ),
    "ForgettingAttention window": MixerMember(
        partial(ForgettingAttention, WIDTH, num_heads=2, window=4), cheap=True, reach=4
    ),
    "PaTHAttention": MixerMember(
        partial(PaTHAttention, WIDTH, num_heads=4, num_kv_heads=2, rank=3),
        recurrent=False,
        extreme={"q_proj/kernel": 30.0, "beta_proj/kernel": 300.0},
        slow=True,
        whole=True,
    ),
    "PaTHAttention fading": MixerMember(
        partial(PaTHAttention, WIDTH, num_heads=2, rank=3, forget_gate=True),
        recurrent=False,
        extreme={"forget_proj/kernel": 300.0},
        slow=True,
        whole=True,
    ),
    "Attention span": MixerMember(
        partial(Attention, WIDTH, num_heads=4, num_kv_heads=2, max_span=4, span_ramp=2),
        cheap=True,
        reach=6,
        gradient=None,
    ),
    "Attention blocks": MixerMember(partial(Attention, WIDTH, num_heads=2, block_size=3), cheap=True, reach=3),
    "Attention blocks looking back": MixerMember(
        partial(Attention, WIDTH, num_heads=2, num_kv_heads=1, block_size=3, look_back=1), cheap=True, reach=6
    ),
    "SubsampledAttention": MixerMember(partial(SubsampledAttention, WIDTH, num_heads=2), recurrent=False, cheap=True),
    "Longformer": MixerMember(
        partial(Longformer, WIDTH, num_heads=2, window=2, dilation=(1, 2)), cheap=True, reach=5, whole=True
    ),
    "Performer": MixerMember(
        partial(Performer, WIDTH, num_heads=2, num_features=5, chunk_size=CHUNK),
        extreme={"k_proj/kernel": 1e3},
        slow=True,
    ),
    "KroneckerAttention": MixerMember(
        partial(KroneckerAttention, WIDTH, num_heads=2, block_size=4),
        recurrent=False,
        cheap=True,
        whole=True,
    ),
    "KroneckerAttention ordered": MixerMember(
        partial(KroneckerAttention, WIDTH, num_heads=2, ordered=True), recurrent=False, cheap=True, whole=True
    ),
    "KroneckerAttention polynomial": MixerMember(
        partial(KroneckerAttention, WIDTH, num_heads=4, degree=2),
        extreme={"q_proj/kernel": 1e4, "k1_proj/kernel": 1e4},
        slow=True,
    ),
    "KroneckerAttention polynomial ordered": MixerMember(
        partial(KroneckerAttention, WIDTH, num_heads=4, degree=2, ordered=True), cheap=True
    ),
    "BigBird": MixerMember(
        partial(BigBird, WIDTH, num_heads=2, block_size=2, num_global_blocks=1, num_random_blocks=1),
        recurrent=False,
        cheap=True,
        packs=False,
        whole=True,
    ),
    "SelectiveAttention": MixerMember(
        partial(SelectiveAttention, WIDTH, num_heads=2),
        recurrent=False,
        extreme={"q_proj/kernel": 30.0, "k_proj/kernel": 30.0, "select_proj/kernel": -1e4},
        slow=True,
    ),
    "SelectiveAttention selected": MixerMember(
        partial(SelectiveAttention, WIDTH, num_heads=2, threshold=0.5), recurrent=False, cheap=True
    ),
    "SelectiveAttention all keys": MixerMember(
        partial(SelectiveAttention, WIDTH, num_heads=2, threshold=0.5, keys="all"), recurrent=False, cheap=True
    ),
    "LinearAttention bare": MixerMember(
        partial(LinearAttention, WIDTH, num_heads=2, feature_map="dpfp", normalise=False), cheap=True
    ),
} | {
    f"S4D {rule}": MixerMember(
        partial(S4D, WIDTH, state_size=8, num_copies=2, initialisation=("inv", "lin"), discretisation=rule), cheap=True
    )
    for rule in DISCRETISATIONS
}
#: Names of those that run every law.
FULL_MIXERS = [
    pytest.param(name, marks=[pytest.mark.slow] * member.slow) for name, member in MIXERS.items() if not member.cheap
]


def initialised(member: MixerMember, **fields):
    """A module, and parameters far enough from their start that every one of them matters."""
    module = member.build(**fields)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, WIDTH), module.dtype or jnp.float32))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return module, jax.tree.unflatten(structure, moved)


def random_params(module, *inputs):
    """Parameters of no start, for laws that hold of any: made without compiling what draws one."""
    shapes, rng = jax.eval_shape(module.init, jax.random.key(0), *inputs), np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)
