"""S_t = S_{t-1} diag(exp g_t) + k_t v_tᵀ: linear attention whose decay is per value channel, on transposed states."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..monoid import OuterProduct, outer_product
from ..shapes import promoted
from .chunkwise import Roles, between_blocks, chunkwise, itself, product

# The forms take queries and keys `B T H K`, values and log decays `B T H V`, and a float32 state Sᵀ, `B H V K`: its
# rows decay, as in the other forms, but they are what is read, not what is read along.


def sequential(q, k, v, g, S):
    def step(S, token):
        q, k, v, g = token
        S = jnp.exp(g)[..., None] * S + v[..., None] * k[..., None, :]
        return S, jnp.einsum("bhvk,bhk->bhv", S, q)

    S, o = lax.scan(step, S, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g)))
    return o.swapaxes(0, 1), S


def parallel(q, k, v, g, S):
    """The scan of the monoid itself: it keeps every state, T·K·V numbers a head."""
    states, final = scan.parallel(outer_product, OuterProduct.from_token(g, v, k), S)
    return jnp.einsum("bthvk,bthk->bthv", states, q), final


ROLES = Roles(writes=("v",), outputs=True)


def chunked(q, k, v, g, S, chunk_size):
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    return chunkwise(partial(_chunk, dtype), ROLES, chunk_size, {"q": q, "k": k, "v": v}, g, S)


def _chunk(dtype, tokens, decays, S):
    """o_i = e^{G_i} ⊙ S q_i + Σ_{j≤i} (q_i · k_j) e^{G_i − G_j} ⊙ v_j, the weights without decay."""
    q, k, v = (tokens[name] for name in "qkv")
    weights = product("bhik,bhjk->bhij", q, k, dtype)
    o = decays.from_start * product("bhvk,bhik->bhiv", S, q, dtype) + itself(q, k) * v
    o += between_blocks(weights, v, decays, dtype)
    return o, decays.total * S + product("bhiv,bhik->bhvk", decays.to_end * v, k, dtype)


FORMS = sequential, parallel, chunked
