"""Kernels as long as the sequence, computed from the sequence: the conditioning networks of Orchid, and their use.

A spectrum is that of a real kernel, so that of T frequencies the first T // 2 + 1 tell all; filters over frequency go
round all T. A filter that is not symmetric would give a kernel that is not real; the real part of what it makes is
taken, which is the same as making the filter symmetric. F is T // 2 + 1 with transform "dft", and T with "dct".
"""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import Array, Float, Inexact, accumulator, typed
from .convolution import fourier_convolution

PADDINGS = ("circular", "zero")
TRANSFORMS = ("dft", "dct")


@typed
def centred_convolution(
    x: Inexact[Array, "B T D"], weight: Float[Array, "W D"], *, padding: str = "circular"
) -> Inexact[Array, "B T D"]:
    """A depthwise convolution that looks both ways, over axis 1: time, or frequency.

        y_n = Σ_w weight_w ⊙ x_{n+w-(W-1)/2}

    Beyond the ends lies the other end with `padding` "circular", and nothing with "zero".

    Raises:
      ValueError: W is even, so that there is no centre, or the padding is unknown.
    """
    reach = _reach(weight)
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is unknown; choose one of {', '.join(PADDINGS)}.")
    around = jnp.pad(x, [(0, 0), (reach, reach), (0, 0)], "wrap" if padding == "circular" else "constant")
    return _weighed(around, weight)


@typed
def magnitude_spectrum(
    x: Float[Array, "B T D"], frequency_weight: Float[Array, "W D"], *, transform: str = "dft", ortho: bool = True
) -> Inexact[Array, "B F D"]:
    """conv(|F x|): the phase, and with it the place in time, is left out (Orchid, arXiv 2402.18508, eq. 2).

    With `ortho` the transform keeps the norm, so that values do not grow with T. The root is of re² + im² + 1e-12,
    which has a gradient at 0.

    Raises:
      ValueError: the transform is unknown, or the window is even.
    """
    spectrum = _transformed(x, transform, ortho)
    power = spectrum.real**2 + spectrum.imag**2 if jnp.iscomplexobj(spectrum) else spectrum**2
    return _over_frequency(jnp.sqrt(power + 1e-12), frequency_weight, x.shape[1], transform)


@typed
def correlation_spectrum(
    key: Float[Array, "B T D"],
    query: Float[Array, "B T D"],
    frequency_weight: Float[Array, "W D"],
    *,
    transform: str = "dft",
    ortho: bool = True,
) -> Inexact[Array, "B F D"]:
    """conv(F*(key) ⊙ F(query)): the spectrum of their cross-correlation (Orchid, arXiv 2402.18508, eq. 3).

    `ortho` as in `magnitude_spectrum`, whose square this is where key and query are one.

    Raises:
      ValueError: the transform is unknown, or the window is even.
    """
    spectrum = jnp.conj(_transformed(key, transform, ortho)) * _transformed(query, transform, ortho)
    return _over_frequency(spectrum, frequency_weight, key.shape[1], transform)


@typed
def spectral_convolution(
    x: Float[Array, "B T D"],
    spectrum: Inexact[Array, "B F D"] | None,
    kernel: Float[Array, "L D"],
    *,
    transform: str = "dft",
) -> Float[Array, "B T D"]:
    """Circular convolution with a kernel a sequence, given by its spectrum, and one for all: real F⁻¹((h + F k) ⊙ F x).

    `transform` is what `spectrum` is of: where it is a cosine transform, its inverse is the kernel. None is no
    spectrum. At least in float32.

    Raises:
      ValueError: the kernel is not as long as x, the spectrum not one of its length, or the transform is unknown.
    """
    if kernel.shape[0] != x.shape[1]:
        raise ValueError(f"kernel has length {kernel.shape[0]}; x has {x.shape[1]}, and spectra are of equal length.")
    _check_transform(transform)
    due = x.shape[1] if transform == "dct" else x.shape[1] // 2 + 1
    if spectrum is not None and spectrum.shape[1] != due:
        raise ValueError(
            f"spectrum has {spectrum.shape[1]} frequencies; a {transform} of {x.shape[1]} steps has {due}."
        )
    wide = accumulator(x.dtype)
    kernel = kernel.astype(wide)[None]
    if spectrum is not None and transform == "dct":
        kernel, spectrum = kernel + jax.scipy.fft.idct(spectrum, axis=1, norm="ortho"), None
    if spectrum is None:
        return fourier_convolution(x, kernel, causal=False)
    total = jnp.fft.rfft(kernel, axis=1)
    total += spectrum.astype(total.dtype)
    return jnp.fft.irfft(total * jnp.fft.rfft(x.astype(wide), axis=1), x.shape[1], axis=1).astype(x.dtype)


def _reach(weight: Array) -> int:
    """How far a window looks to each side."""
    if len(weight) % 2 == 0:
        raise ValueError(
            f"weight has shape {weight.shape}; a centred convolution takes an odd window, not {len(weight)}."
        )
    return len(weight) // 2


def _weighed(around: Array, weight: Array) -> Array:
    """Weighted sums over windows; `around` has (W − 1) / 2 entries more at each end."""
    window, length = len(weight), around.shape[1] - len(weight) + 1
    weight = weight.astype(around.dtype)[:, None, None]
    return reduce(jnp.add, (weight[w] * around[:, w : w + length] for w in range(window)))


def _over_frequency(spectrum: Array, weight: Array, length: int, transform: str) -> Array:
    """The convolution over the circle of all frequencies, where half are given with the filter's symmetric part."""
    if transform == "dct":
        return centred_convolution(spectrum, weight)
    reach, count = _reach(weight), spectrum.shape[1]

    def next_to(first: int):
        """`reach` frequencies from this one on, of which those beyond the half are conjugate to those within."""
        at = np.arange(first, first + reach) % length
        mirrored = at > length // 2
        found = spectrum[:, np.where(mirrored, length - at, at)]
        return jnp.where(mirrored[None, :, None], jnp.conj(found), found)

    around = jnp.concatenate([next_to(-reach), spectrum, next_to(count)], axis=1)
    return _weighed(around, (weight + weight[::-1]) / 2)


def _transformed(x, transform: str, ortho: bool):
    _check_transform(transform)
    x = x.astype(accumulator(x.dtype))
    if transform == "dct":
        return jax.scipy.fft.dct(x, axis=1, norm="ortho")
    return jnp.fft.rfft(x, axis=1, norm="ortho" if ortho else "backward")


def _check_transform(transform: str) -> None:
    if transform not in TRANSFORMS:
        raise ValueError(f"transform={transform!r} is unknown; choose one of {', '.join(TRANSFORMS)}.")
