"""How well scores find anomalies: by rank, at a threshold, and what point adjustment would make of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata


def auroc(scores: Float[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]) -> float:
    """How likely an anomalous point scores above a normal one; equal scores count half.

    Raises:
      ValueError: shapes disagree, a score is not finite, or there is but one kind of points.
    """
    positives, negatives = _counts(scores, anomalous)
    above = rankdata(scores)[anomalous].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def average_precision(scores: Float[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]) -> float:
    """Σ_n (R_n − R_{n−1}) P_n over the thresholds n that differ, from the highest; a random score has the base rate.

    Raises:
      ValueError: as `auroc` does.
    """
    positives, _ = _counts(scores, anomalous)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each run of equal scores
    found = np.cumsum(anomalous[order])[last]
    return float(np.sum(np.diff(found, prepend=0) * found / (last + 1)) / positives)


class Rates(NamedTuple):
    """Of alarms, point by point. Without any alarm the precision is 0."""

    precision: float
    recall: float
    f1: float
    false_alarms: float  # share of the normal points


def alarm_rates(alarms: Bool[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]) -> Rates:
    """Precision, recall, F1 and false alarms; a rate of nothing is 0.

    Raises:
      ValueError: shapes disagree.
    """
    _check_alike(alarms=alarms, anomalous=anomalous)
    share = lambda part, whole: float(np.sum(part) / max(1, np.sum(whole)))
    hits = alarms & anomalous
    f1 = 2 * float(hits.sum()) / max(1, int(alarms.sum() + anomalous.sum()))
    return Rates(share(hits, alarms), share(hits, anomalous), f1, share(alarms & ~anomalous, ~anomalous))


def runs_found(alarms: Bool[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]) -> float:
    """The share of runs of anomalous points in which there is an alarm.

    Raises:
      ValueError: shapes disagree, or no point is anomalous.
    """
    run, found = _runs(alarms, anomalous)
    if not run.any():
        raise ValueError("anomalous holds no run; there is none to find.")
    return float(found[1:].mean())


def point_adjusted(alarms: Bool[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """The alarms, and all of each run of anomalous points in which there is one: NOT a fair way to score.

    One lucky alarm counts as hundreds: a score drawn at random rates high (arXiv 2109.05257). To show how high.

    Raises:
      ValueError: shapes disagree.
    """
    run, found = _runs(alarms, anomalous)
    return alarms | found[run]


def _runs(alarms: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The run of each point, counted from 1, 0 where it is normal; and whether a run holds an alarm, False for 0."""
    _check_alike(alarms=alarms, anomalous=anomalous)
    run = np.cumsum(np.diff(anomalous.astype(int), prepend=0) == 1) * anomalous
    found = np.bincount(run, weights=alarms) > 0
    found[:1] = False
    return run, found


def _counts(scores: np.ndarray, anomalous: np.ndarray) -> tuple[int, int]:
    _check_alike(scores=scores, anomalous=anomalous)
    if not np.isfinite(scores).all():
        raise ValueError(f"scores holds {np.sum(~np.isfinite(scores))} values that are not finite.")
    positives = int(anomalous.sum())
    if positives in (0, len(anomalous)):
        raise ValueError(f"{positives} of the {len(anomalous)} points are anomalous; some have to be, and not all.")
    return positives, len(anomalous) - positives


def _check_alike(**arrays: np.ndarray) -> None:
    shapes = {x.shape for x in arrays.values()}
    if len(shapes) > 1 or any(x.ndim != 1 for x in arrays.values()) or arrays["anomalous"].dtype != bool:
        said = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in arrays.items())
        raise ValueError(f"{said}: all are of one length, anomalous holds booleans.")
