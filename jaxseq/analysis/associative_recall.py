"""How much of what one language model predicts better than another is associative recall."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer


def recall_hits(
    contexts: Integer[np.ndarray, "N T"], training: Integer[np.ndarray, " M"], *, most: int
) -> Bool[np.ndarray, "N T"]:
    """True where a token can be predicted by recall (Zoology, arXiv 2312.04927, section 3).

    The pair (x_{t-1}, x_t) stands earlier in the same context, and occurs `most` times at most in the tokens of
    `training`, so that it is in few models' memory. The first token of a context has no pair. Takes
    O(N T log T + M log M) for N contexts of T tokens.

    Raises:
      ValueError: shapes are others, tokens are no whole numbers, one is negative, or `most` is.
    """
    if contexts.ndim != 2 or training.ndim != 1:
        raise ValueError(f"contexts has shape {contexts.shape}, training {training.shape}; they are N T and M.")
    for name, tokens in (("contexts", contexts), ("training", training)):
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"{name} is of {tokens.dtype}; tokens are whole numbers.")
    if most < 0:
        raise ValueError(f"most={most}; a number of occurrences is 0 or more.")
    lowest = min(x.min(initial=0) for x in (contexts, training))
    if lowest < 0:
        raise ValueError(f"token {lowest} is negative; tokens are 0 or more.")
    vocabulary = 1 + max(int(x.max(initial=0)) for x in (contexts, training))
    pairs = _pairs(contexts, vocabulary)
    # Equal pairs lie side by side, in the order of time since the sort is stable: all but the first of a run repeat it.
    order = np.argsort(pairs, axis=1, kind="stable")
    ranked = np.take_along_axis(pairs, order, axis=1)
    again = np.zeros_like(pairs, bool)
    np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    known = np.sort(_pairs(training, vocabulary))
    count = np.searchsorted(known, pairs, "right") - np.searchsorted(known, pairs, "left")
    hits = np.zeros(contexts.shape, bool)
    hits[:, 1:] = again & (count <= most)
    return hits


def _pairs(tokens: Integer[np.ndarray, "*N T"], vocabulary: int) -> Integer[np.ndarray, "*N T-1"]:
    """Each token with the one before it, as one number."""
    tokens = tokens.astype(np.int64)
    return tokens[..., :-1] * vocabulary + tokens[..., 1:]


class Interval(NamedTuple):
    """An estimate, and where 95 % of what resampling gives lie."""

    value: float
    low: float
    high: float


def sliced_perplexity(nats: Float[np.ndarray, "N T"], hits: Bool[np.ndarray, "N T"]) -> dict[str, float]:
    """exp(mean nats) of "all" tokens, of the recall "hits" and of the "other" ones; NaN where there are none.

    Raises:
      ValueError: shapes disagree, or hits are not of bool.
    """
    _check_alike(nats=nats, hits=hits)
    slices = {"all": np.ones_like(hits), "hits": hits, "other": ~hits}
    return {name: float(np.exp(nats[where].mean())) if where.any() else float("nan") for name, where in slices.items()}


def share_of_gap(
    nats: Float[np.ndarray, "N T"],
    reference: Float[np.ndarray, "N T"],
    hits: Bool[np.ndarray, "N T"],
    *,
    groups: Integer[np.ndarray, " N"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """How much of a model's gap to a reference is on recall hits (Zoology, section 3).

        share = (tokens_hits / tokens) (NLL_hits − NLL_hits^ref) / (NLL − NLL^ref)

    "gap" is NLL − NLL^ref in nats a token, "share" the above, "tokens" the hits' share of the tokens, and "excess"
    share − tokens: above zero, a hit weighs more in the gap than another token. The share of a gap whose interval
    holds zero means nothing. Intervals are as in `bootstrap`.

    Raises:
      ValueError: shapes disagree, hits are not of bool, or as `bootstrap` does.
    """
    _check_alike(nats=nats, reference=reference, hits=hits)
    lost = np.asarray(nats, np.float64) - reference
    each = np.stack([lost.sum(1), (lost * hits).sum(1), hits.sum(1), np.full(len(hits), hits.shape[1])], axis=1)

    def measures(gap, on_hits, hits, tokens):
        share = on_hits / gap
        return {"gap": gap / tokens, "share": share, "tokens": hits / tokens, "excess": share - hits / tokens}

    return bootstrap(each, measures, groups=groups, resamples=resamples, seed=seed)


def gap_closed(
    nats: Float[np.ndarray, "N T"],
    baseline: Float[np.ndarray, "N T"],
    reference: Float[np.ndarray, "N T"],
    *,
    where: Bool[np.ndarray, "N T"] | None = None,
    groups: Integer[np.ndarray, " N"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """(NLL^base − NLL) / (NLL^base − NLL^ref): 0 for a model as good as the baseline, 1 for one as the reference.

    Of the tokens where `where` is true, such as recall hits; of all when None. It means nothing of a gap whose interval
    holds zero. Intervals are as in `bootstrap`.

    Raises:
      ValueError: as `share_of_gap` does.
    """
    where = np.ones_like(nats, bool) if where is None else where
    _check_alike(nats=nats, baseline=baseline, reference=reference, where=where)
    gained = [np.where(where, np.asarray(baseline, np.float64) - x, 0) for x in (nats, reference)]
    each = np.sum(gained, axis=2).T
    closed = lambda gained, gap: {"closed": gained / gap}
    return bootstrap(each, closed, groups=groups, resamples=resamples, seed=seed)["closed"]


def bootstrap(
    each: Float[np.ndarray, "N F"],
    measures: Callable[..., dict[str, np.ndarray]],
    *,
    groups: Integer[np.ndarray, " N"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """`measures` of the F sums over N contexts, and of those over contexts drawn with replacement.

    Whole `groups` of contexts, such as documents, are drawn, each context by itself when None: what is in one is not
    independent. Intervals hold 95 % of what is drawn.

    Raises:
      ValueError: there are fewer than two groups, or fewer `resamples` than two.
    """
    groups = np.arange(len(each)) if groups is None else groups
    if groups.shape != each.shape[:1]:
        raise ValueError(f"groups has shape {groups.shape}; there are {len(each)} contexts.")
    names, group = np.unique(groups, return_inverse=True)
    for name, number in (("groups", len(names)), ("resamples", resamples)):
        if number < 2:
            raise ValueError(f"{name}: {number}; a bootstrap takes two or more.")
    sums = np.zeros((len(names), each.shape[1]))
    np.add.at(sums, group, each)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        found, resampled = measures(*sums.sum(0)), measures(*(drawn @ sums).T)
    bounds = {name: np.quantile(values, (0.025, 0.975)) for name, values in resampled.items()}
    return {name: Interval(float(found[name]), *map(float, bounds[name])) for name in found}


def _check_alike(**arrays: np.ndarray) -> None:
    """Raise unless all shapes agree and masks are of bool; 0 and 1 would index rows."""
    if len({x.shape for x in arrays.values()}) > 1 or any(x.ndim != 2 for x in arrays.values()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
        raise ValueError(f"{shapes}: all are N T.")
    for name in ("hits", "where"):
        if name in arrays and arrays[name].dtype != bool:
            raise ValueError(f"{name} is of {arrays[name].dtype}; it is of bool.")
