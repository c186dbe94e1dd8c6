"""Pictures of latent-variable models, mostly of images."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from flowvi.checks import require
from flowvi.params import PyTree
from flowvi.plotting.curves import panels, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Shape = tuple[int, ...]

#: A `flowvi.VAE`, whose room stands above this one.
Model = Any


def _image_shape(vae: Model, image_shape: Sequence[int] | None) -> Shape:
    """(height, width) or (height, width, channels) of one x."""
    shape = tuple(vae.event_shape) if image_shape is None else tuple(image_shape)
    if image_shape is None and len(shape) == 1 and math.isqrt(shape[0]) ** 2 == shape[0]:
        shape = (math.isqrt(shape[0]),) * 2
    if len(shape) == 3 and shape[-1] == 1:
        shape = shape[:2]
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[-1] == 3)
    rule = "`image_shape` must be (height, width) or (height, width, 3), with as many numbers as an"
    fits = is_image and math.prod(shape) == math.prod(vae.event_shape)
    require(fits, f"{rule} event of shape {tuple(vae.event_shape)} has", image_shape)
    return shape


def _mosaic(images: ArrayLike, shape: Shape, num_columns: int, gap: int = 1) -> np.ndarray:
    """Images side by side, row by row, in one array with gaps of NaN between them."""
    images = np.asarray(images, np.float32).reshape(-1, *shape)
    num_rows = -(-len(images) // num_columns)
    height, width = shape[0] + gap, shape[1] + gap
    canvas = np.full((num_rows * height - gap, num_columns * width - gap, *shape[2:]), np.nan)
    for index, image in enumerate(images):
        top, left = index // num_columns * height, index % num_columns * width
        canvas[top : top + shape[0], left : left + shape[1]] = image
    return canvas


def _span(images: ArrayLike) -> tuple[float, float]:
    """The range of grey: that of images in [0, 1] is all of it."""
    low, high = float(np.min(images)), float(np.max(images))
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-6))


def _show(canvas: np.ndarray, span: tuple[float, float], inches: float, title: str) -> "Figure":
    """A figure of nothing but the canvas, in which one pixel is as wide as it is high."""
    figure, ((axis,),) = panels(inches, inches * canvas.shape[0] / canvas.shape[1] + 0.3)
    _draw(axis, canvas, span)
    axis.set_title(title, fontsize=9)
    return figure


def _draw(axis: "Axes", canvas: np.ndarray, span: tuple[float, float], **options: Any) -> None:
    low, high = span
    if canvas.ndim == 3:
        canvas = np.nan_to_num(np.clip((canvas - low) / (high - low), 0, 1), nan=1.0)
    options |= {"cmap": pyplot().get_cmap("gray_r").with_extremes(bad="white")}
    axis.imshow(canvas, vmin=low, vmax=high, interpolation="nearest", **options)
    if "extent" not in options:
        axis.set_axis_off()


def prior_samples(
    vae: Model,
    params: PyTree,
    key: jax.Array,
    *,
    num_rows: int = 6,
    num_columns: int = 12,
    means: bool = True,
    context: ArrayLike | None = None,
    image_shape: Sequence[int] | None = None,
) -> "Figure":
    """Images that a `VAE` makes up: z from the prior, and the mean of p(x | z), or a draw of it.

    With a context of shape [num_rows, *context_shape] each of its rows is a row of images.
    `image_shape` is (height, width) or (height, width, 3): by default the event's own shape, and
    that of a square for a vector, here and below.
    """
    shape = _image_shape(vae, image_shape)
    count = num_rows * num_columns if context is None else num_columns
    if means:
        z, _ = vae.sample_latents(params, key, (count,), context)
        x = vae.decode(params, z, context=context)
    else:
        x = vae.sample(params, key, count, context=context)
    x = np.asarray(x) if context is None else np.swapaxes(x, 0, 1)
    canvas = _mosaic(x, shape, num_columns)
    return _show(canvas, _span(x), 0.55 * num_columns, "draws of the prior, decoded")


def reconstructions(
    vae: Model,
    params: PyTree,
    key: jax.Array,
    x: ArrayLike,
    *,
    num_columns: int = 12,
    context: ArrayLike | None = None,
    image_shape: Sequence[int] | None = None,
) -> "Figure":
    """Observations of shape [n, *event_shape], and below each p(x | z)'s mean, z from q(z | x)."""
    shape = _image_shape(vae, image_shape)
    x = np.asarray(x, np.float32)
    columns = min(num_columns, len(x))
    again = vae.reconstruct(params, key, x, context=context)
    both = np.stack([each.reshape(-1, *shape) for each in (x, again)])
    missing = -len(x) % columns
    both = np.pad(both, [(0, 0), (0, missing)] + [(0, 0)] * len(shape), constant_values=np.nan)
    rows = both.reshape(2, -1, columns, *shape).swapaxes(0, 1)
    title = "observations, and their reconstructions below"
    return _show(_mosaic(rows, shape, columns), _span(x), 0.55 * columns, title)


def latent_space(
    vae: Model,
    params: PyTree,
    key: jax.Array,
    x: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    context: ArrayLike | None = None,
) -> "Figure":
    """A draw of q(z | x) for each of n observations, in the plane, coloured by n labels."""
    _check_plane(vae)
    z = np.asarray(vae.encode(params, key, x, context=context)).reshape(-1, 2)
    figure, ((axis,),) = panels(5.6, 5)
    size = float(np.clip(2e4 / len(z), 2, 14))
    labels = None if labels is None else np.asarray(labels)
    kinds = np.zeros(1) if labels is None else np.unique(labels)
    colours = pyplot().get_cmap("tab10" if len(kinds) <= 10 else "tab20")
    # Drawn one by one in a random order, or the last label would cover the others.
    index = np.searchsorted(kinds, np.zeros(len(z)) if labels is None else labels)
    order = np.random.default_rng(0).permutation(len(z))
    axis.scatter(*z[order].T, s=size, linewidths=0, alpha=0.8, color=colours(index[order] % 20))
    if labels is not None:
        for place, kind in enumerate(kinds):
            axis.scatter([], [], s=30, color=colours(place), label=str(kind))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    return figure


def manifold(
    vae: Model,
    params: PyTree,
    *,
    size: int = 20,
    context: ArrayLike | None = None,
    image_shape: Sequence[int] | None = None,
) -> "Figure":
    """The mean of p(x | z) over a grid of the latent plane, even in the prior's probability.

    A context is one y, of the shape `context_shape`.

    The coordinates of the grid are the inverse normal CDF of (i + 1/2) / size, so that each image
    stands for the same share of a standard normal prior.
    """
    _check_plane(vae)
    shape = _image_shape(vae, image_shape)
    line = np.asarray(jax.scipy.special.ndtri((np.arange(size) + 0.5) / size))
    # Pictures are read from the top, axes from the bottom.
    second, first = np.meshgrid(line[::-1], line, indexing="ij")
    z = np.stack([first, second], -1).reshape(size**2, *vae.latent_shape)
    x = vae.decode(params, z, context=context)
    figure, ((axis,),) = panels(6.4, 6.4 * shape[0] / shape[1])
    _draw(axis, _mosaic(x, shape, size), _span(x), extent=(0, 1, 0, 1))
    axis.set_aspect(shape[0] / shape[1])
    ticks = np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    places = np.asarray(jax.scipy.stats.norm.cdf(ticks))
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(places, [f"{tick:g}" for tick in ticks])
    axis.set(xlabel="$z_1$", ylabel="$z_2$")
    axis.tick_params(length=2)
    axis.spines[:].set_visible(False)
    return figure


def _check_plane(vae: Model) -> None:
    rule = "`vae` must have two latent coordinates for a picture in the plane"
    got = f"latent shape {tuple(vae.latent_shape)}"
    require(math.prod(vae.latent_shape) == 2, rule, got, say=str)
