"""S ← diag(exp g_t) S_{t-1}, S_t = S + β_t k_t (v_t − Sᵀ k_t)ᵀ, o_t = scale · S_tᵀ q_t: the delta rule, with decay."""

from functools import partial

import jax.numpy as jnp

from .. import scan
from ..exact import einsum
from ..monoid import MatrixMap, matrix_map
from ..shapes import Array, Float, Int, promoted, typed
from ..sharded import across_devices, own
from .chunkwise import Chunk, Roles, chunks, chunkwise
from .dispatch import dispatch
from .matrix_state import arguments, best, in_accumulator, per_head, total_map
from .one_token import one_token

# The forms take queries and keys `B T H K` (the last two forms of fewer heads too), values `B T H V`, β `B T H 1`, log
# decays `B T H K` or `B T H 1`, and a float32 state `B H K V`.


def sequential(q, k, v, beta, g, S):
    def step(S, token):
        q, k, v, beta, g = token
        S = jnp.exp(g)[..., None] * S
        error = v - einsum("bhkv,bhk->bhv", S, k)
        S = S + (beta * k)[..., None] * error[..., None, :]
        return S, einsum("bhkv,bhk->bhv", S, q)

    return scan.loop(step, S, (q, k, v, beta, g))


def parallel(q, k, v, beta, g, S):
    """The scan of the monoid itself: it keeps every transition, T·K·(K + V) numbers a head."""
    erase = jnp.eye(k.shape[-1], dtype=S.dtype)[None, None, None] - (beta * k)[..., None] * k[..., None, :]
    update = (beta * k)[..., None] * v[..., None, :]
    states, final = scan.parallel(matrix_map, MatrixMap(erase * jnp.exp(g)[..., None, :], update), S)
    return einsum("bthkv,bthk->bthv", states, q), final


ROLES = Roles(reads=("q", "a"), writes=("k",))


def chunked(q, k, v, beta, g, S, *, place):
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    strength = lambda x: (beta.astype(S.dtype) * x.astype(S.dtype)).astype(dtype)
    tokens = {"q": q, "k": k, "v": strength(v), "a": strength(per_head(k, v.shape[2]))}
    chunk = Chunk(dtype, _prepare, _through, pairs=("inverse", "A"), finish=_finish, exact=("inverse",))
    return chunkwise(chunk, ROLES, place, tokens, g, S)


def _prepare(dtype, within, rows, decays):
    """What corrections have to do with one another, A_ak, that `_finish` inverts, and with what is read."""
    q, k, a = (rows[name] for name in "qka")
    A_ak, A = within.scores((a, q), (k,), decays, dtype)
    A += within.diagonal_matrix(within.diagonal(q, k))
    decayed = {"q": decays.from_start * q, "k": decays.to_end * k, "a": decays.from_start * a}
    return {"inverse": A_ak, "A": A} | decayed


def _finish(within, pairs):
    """(I + A_ak)⁻¹"""
    return pairs | {"inverse": within.inverse(pairs["inverse"])}


def _through(dtype, within, columns, prepared, total, S):
    """All corrections u = β (v − Sᵀ k) at once, each less by what the ones before it have written (WY form):

    u = (I + A_ak)⁻¹ (β V − (a ⊙ e^G) S)        a = β k        (Gated DeltaNet, arXiv 2412.06464, section 3.3)
    """
    from_state = lambda x: within.product("...ik,...kv->...iv", x, S, dtype)
    # Repeated keys: an inverse in bfloat16 is none.
    u = within.product("...ij,...jv->...iv", prepared["inverse"], columns["v"] - from_state(prepared["a"]), S.dtype)
    o = within.product("...ij,...jv->...iv", prepared["A"], u, dtype) + from_state(prepared["q"])
    return o, total * S + within.product("...ik,...iv->...kv", prepared["k"], u, dtype)


def single(q, k, v, beta, g, S):
    return one_token(_token, S, {"q": q, "k": k, "beta": beta, "g": g}, {"v": v})


def _token(S, of):
    S = jnp.exp(of["g"]) * S
    error = of["v"] - jnp.sum(of["k"] * S, axis=-2, keepdims=True)
    S = S + of["beta"] * of["k"] * error
    return S, jnp.sum(of["q"] * S, axis=-2, keepdims=True)


@typed
def delta_rule(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T _ K"] | Float[Array, "B T _"] | Float[Array, "H"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """A matrix state in which every key overwrites the value it finds, after a decay if there is one.

        S_t = (I − β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    `log_decay` g is None (DeltaNet, arXiv 2406.06484, eq. 2), per head `B T H` (Gated DeltaNet, arXiv 2412.06464, eq.
    10) or per channel `B T H K` (KDA, arXiv 2510.26692). Keys are used as given: states are bounded where β |k|² is
    between 0 and 2, as with unit keys. Log decays, heads, `scale`, states and segments are those of
    `gated_linear_attention`. `chunked` solves for the corrections of a chunk by one inverse of a unit triangular
    matrix, made of matrix products.

    Raises:
      ValueError: shapes disagree, T = 0, chunk_size < 1, or a log decay is known to be above 0.
      NotImplementedError: `impl` is none of the forms.
    """
    length = value.shape[1]
    q, k, g, S = arguments("delta_rule", query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size)
    forms = {
        "sequential": in_accumulator(sequential, S),
        "parallel": in_accumulator(parallel, S),
        **chunks("delta_rule", chunked, single, length, chunk_size),
    }
    form = dispatch("delta_rule", impl, forms, *best(length))
    v, beta = own((value, beta[..., None]))
    run = lambda v, S: form(q, k, v, beta, g, S)
    o, final = across_devices(matrix_map, lambda: total_map(run, v, S), partial(run, v), S)
    return o.astype(value.dtype), final
