"""AdamW whose groups of parameters are told apart by their paths."""

import optax

from .config import TrainConfig
from .paths import matching

STATE_SPACE = r"(^|/)(log_dt|A_log|A_real|A_imag|B|dt_bias|nu_log|theta_log|gamma_log)$"
DECAYED = r"(^|/)(kernel|embedding)$"


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `final_learning_rate_ratio` of it at the last step."""
    peak, final = config.learning_rate, config.final_learning_rate_ratio
    warmup = min(config.warmup_steps, config.steps)
    # The first step already moves: the rise is from peak / (warmup + 1), not from zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    fall = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), final)
    return optax.join_schedules([rise, fall], [warmup])


def adamw(
    config: TrainConfig, *, decayed: str = DECAYED, state_space: str = STATE_SPACE
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, learning rate by schedule and group.

    Parameters whose path matches `decayed` decay; those that match `state_space` learn at
    min(learning_rate, state_space_learning_rate), on the same schedule. All others do neither.
    """
    ratio = min(1.0, config.state_space_learning_rate / config.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(*config.betas),
        optax.add_decayed_weights(config.weight_decay, mask=matching(decayed)),
        optax.masked(optax.scale(ratio), matching(state_space)),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
