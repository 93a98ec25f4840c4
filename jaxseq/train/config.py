"""The options every experiment shares, under the same names on every command line."""

import math
from dataclasses import dataclass
from typing import Literal

from ..fields import check_counts, check_positive


@dataclass(frozen=True)
class TrainConfig:
    """Training: length, batches, optimizer."""

    steps: int = 1000
    """Optimizer steps; raise it to continue a finished run."""
    batch_size: int = 32
    """Sequences in one step, over all devices and microbatches."""
    accumulate: int = 1
    """Microbatches whose gradients make one step: less memory, the same step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon orthogonalises the steps of the layers' matrices; all other parameters take Adam's."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly from zero."""
    final_learning_rate_ratio: float = 0.1
    """The cosine decay ends at this fraction of the peak learning rate."""
    state_space_learning_rate: float = 1e-3
    """Peak learning rate of state-space parameters (log_dt, A_real, ...), where below learning_rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, and of C and D of linear state spaces; nothing else decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and the second moment."""
    clip_norm: float = 1.0
    """Global norm the gradient is clipped to."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    evaluate_every: int = 200
    """Steps between evaluations; 0: at the end only."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""

    def __post_init__(self):
        positive = ("batch_size", "accumulate", "learning_rate", "clip_norm", "max_bad_steps", "log_every")
        check_positive(self, *positive, "state_space_learning_rate", section="train.")
        for name in ("steps", "warmup_steps", "weight_decay", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must not be negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={self.betas}; each is 0 or more, below 1.")
        for name in ("learning_rate", "state_space_learning_rate", "final_learning_rate_ratio"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"train.{name}={value}; it is a finite number, not negative.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: how often, how many."""

    every: int = 200
    """Steps between checkpoints; 0: when the run ends or is interrupted only."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"checkpoint.every={self.every} must not be negative.")
        check_counts(self, "keep", section="checkpoint.")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each way of splitting the work; their product is the number of devices used."""

    data: int = 1
    """Copies of the model, each on its part of the batch."""
    fsdp: int = 1
    """Parts of the batch whose devices also share out the parameters."""
    tensor: int = 1
    """Parts of the model's width and vocabulary."""
    sequence: int = 1
    """Parts of the time axis."""

    def __post_init__(self):
        check_counts(self, *vars(self), section="mesh.")
