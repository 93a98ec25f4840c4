"""AdamW and Muon; groups of parameters are told apart by their paths."""

import re

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from .config import TrainConfig
from .paths import matching, named_leaves, path_string

#: Step sizes, A and B of linear state spaces. Mamba's authors let A_log and dt_bias learn at the full rate.
STATE_SPACE = r"(^|/)(log_dt|log_step|A_real|A_imag|Lambda_\w+|nu_log|theta_log|gamma_log|P|B)$"
#: Matrices, and the readouts of linear state spaces.
DECAYED = r"(^|/)(kernel|dt_kernel|embedding|C|C_backward)$"
HIDDEN = r"_proj/kernel$"


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `final_learning_rate_ratio` of it at the last step."""
    peak, final = config.learning_rate, config.final_learning_rate_ratio
    warmup = min(config.warmup_steps, config.steps)
    # The first step already moves: the rise is from peak / (warmup + 1), not from zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), final)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    config: TrainConfig, *, decayed: str = DECAYED, state_space: str = STATE_SPACE, hidden: str = HIDDEN
) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon, decoupled weight decay, learning rate by schedule and group.

    Parameters whose path matches `decayed` decay, and each skip D with the readout C beside it; those that match
    `state_space` learn at min(learning_rate, state_space_learning_rate), on the same schedule. Others do not decay and
    learn at the full rate. With Muon, matrices that match `hidden` move along their orthogonalised momentum, all
    others by Adam.
    """
    ratio = min(1.0, config.state_space_learning_rate / config.learning_rate)
    direction = adam = optax.scale_by_adam(*config.betas)
    if config.optimizer == "muon":
        groups = lambda params: jax.tree.map(lambda found: "hidden" if found else "other", matching(hidden)(params))
        direction = optax.partition({"hidden": _muon(), "other": adam}, groups)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=_decaying(decayed)),
        optax.masked(optax.scale(ratio), matching(state_space)),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def _decaying(pattern: str):
    """The mask of `matching`, and D where C is in it: Mamba's, which has none beside it, does not decay."""

    def mask(params):
        found = named_leaves(matching(pattern)(params))
        decays = lambda path: found[path] or found.get(re.sub(r"(^|/)D$", r"\1C", path), False)
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_string(path)), params)

    return mask


def _muon() -> optax.GradientTransformation:
    """Orthogonalised momentum, scaled to the root mean square of Adam's steps (arXiv 2502.16982, eq. 4)."""
    # A matrix is the last two axes: layers of a stack are led by their depth.
    matrices = lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree)
    scaled = lambda step: 0.2 * max(step.shape[-2:]) ** 0.5 * step
    return optax.chain(
        scale_by_muon(weight_dimension_numbers=matrices),
        optax.stateless(lambda steps, _: jax.tree.map(scaled, steps)),
    )
