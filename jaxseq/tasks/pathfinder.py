"""Pathfinder: are two dots the ends of one dashed curve? The images of the Long Range Arena, drawn anew."""

import math
from functools import partial

import numpy as np

from .draws import require

#: Pixels: half of a dash's width, a dot's radius, and what stays black between curves: more than a pixel's diagonal.
DASH_RADIUS, DOT_RADIUS, CLEARANCE = 0.3, 1.5, 1.5


def pathfinder(
    seed: int,
    num_examples: int,
    *,
    size: int = 32,
    dashes: int = 6,
    distractors: int = 3,
    dash: float = 1.5,
    gap: float = 2.0,
    bend: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Images `N size² 1`, float32 from 0 to 1, row after row, and labels `N`, int32: 1 where one curve joins the dots.

    Two curves of as many `dashes` each are in every image, and curves of a third of them, `distractors` at most. The
    dots are at both ends of one long curve, or at an end of each: nothing near them tells (Linsley et al., arXiv
    1805.08315; Long Range Arena, arXiv 2011.04006, section 2.2.5, with 32 × 32 pixels and, as Path-X, 128 × 128).
    `dash` and `gap` are in pixels, `bend` is the largest turn from dash to dash in radians. Classes are as likely. The
    example is a function of the seed; it runs on the host, a hundredth of a second an image.

    Raises:
      ValueError: a number is none that is taken, or curves of this length hardly fit into an image.
    """
    require(
        "pathfinder", {"size": 16, "distractors": 0},
        num_examples=num_examples, size=size, dashes=dashes, distractors=distractors,
    )  # fmt: skip
    if not (0 < dash < math.inf and 0 < gap < math.inf and 0 <= bend <= math.pi):
        raise ValueError(
            f"dash={dash}, gap={gap}, bend={bend}; pathfinder takes pixels above 0 and radians from 0 to π."
        )
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=num_examples, dtype=np.int32)
    images = np.zeros((num_examples, size, size), np.float32)
    for image, label in zip(images, labels, strict=True):
        one, other, *rest = _curves(rng, size, dashes, distractors, dash, gap, bend)
        _draw(image, np.concatenate([one, other, *rest]), DASH_RADIUS)
        dots = np.stack([one[0, 0], one[-1, 1] if label else other[-1, 1]])
        _draw(image, np.stack([dots, dots], axis=1), DOT_RADIUS)
    return images.reshape(num_examples, size * size, 1), labels


def _curves(rng, size, dashes, distractors, dash, gap, bend) -> list[np.ndarray]:
    """Two long curves and the short ones that fit, each `dashes 2 2`: both ends of every dash."""
    curve = partial(_curve, rng, size, dash, gap, bend)
    for _ in range(100):
        if (one := curve(dashes, DOT_RADIUS, [])) is None or (other := curve(dashes, DOT_RADIUS, [one])) is None:
            continue
        found = [one, other]
        for _ in range(distractors):
            if (short := curve(max(1, dashes // 3), DASH_RADIUS, found)) is not None:
                found.append(short)
        return [discs[:, [0, 2], :2] for discs in found]
    raise ValueError(f"size={size}: two curves of {dashes} dashes of {dash} + {gap} pixels hardly fit; choose fewer.")


def _curve(rng, size, dash, gap, bend, number, ends, taken, tries: int = 30) -> np.ndarray | None:
    """A curve that keeps clear of those that are taken, of itself and of the border, as discs `dashes 3 3`.

    Both ends and the middle of each dash have a place and a radius, that of a dot at the `ends` of the curve.
    """
    edge = DOT_RADIUS + 2  # room for what is drawn of a dot
    for _ in range(tries):
        headings = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-bend, bend, number))
        along = np.stack([np.sin(headings), np.cos(headings)], axis=1)
        # From the middle of a gap to the middle of the next one, around a place within the image.
        corners = np.concatenate([np.zeros((1, 2)), np.cumsum((dash + gap) * along, axis=0)])
        corners += rng.uniform(edge, size - 1 - edge, 2) - corners[number // 2]
        if corners.min() < edge or corners.max() > size - 1 - edge:
            continue
        discs = np.full((number, 3, 3), DASH_RADIUS)
        discs[:, :, :2] = corners[:-1, None] + (gap / 2 + dash * np.array([0, 0.5, 1])[:, None]) * along[:, None]
        discs[0, 0, 2] = discs[-1, -1, 2] = ends
        if any(_black(discs, other).min() < CLEARANCE for other in taken):
            continue
        between = _black(discs, discs).reshape(number, 3, number, 3).min(axis=(1, 3))
        if (between[np.triu_indices(number, 2)] >= CLEARANCE).all():  # dashes that are not next to one another
            return discs
    return None


def _black(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels between what is drawn of each disc and of each other; a disc fades over one."""
    a, b = a.reshape(-1, 1, 3), b.reshape(1, -1, 3)
    return np.linalg.norm(a[..., :2] - b[..., :2], axis=-1) - a[..., 2] - b[..., 2] - 2


def _draw(image: np.ndarray, segments: np.ndarray, radius: float) -> None:
    """Draw segments `N 2 2` within the image: 1 within this distance of each, and 0 a pixel beyond."""
    for start, end in segments:
        low = np.floor(np.minimum(start, end) - radius - 1).astype(int)
        high = np.ceil(np.maximum(start, end) + radius + 1).astype(int) + 1
        pixels = np.moveaxis(np.indices(high - low), 0, -1) + low
        along = end - start
        place = np.clip((pixels - start) @ along / max(along @ along, 1e-12), 0, 1)
        distance = np.linalg.norm(pixels - start - place[..., None] * along, axis=-1)
        window = image[low[0] : high[0], low[1] : high[1]]
        np.maximum(window, np.clip(1 + radius - distance, 0, 1), out=window)
