"""Vectors of pixels and prototypes as a picture of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .projection import pca, tsne

Array = np.ndarray

METHODS = ('pca', 'tsne')
_MARKERS = 'o^sDvP'
_CONTEXT = '#dddddd'
_INK = '#333333'
# Longer legends get columns.
_ROWS = 20
# Inches: a panel's side, space around it, a line of the legends.
_SIDE, _LEFT, _GAP, _TOP, _BOTTOM, _LINE = 4.4, 0.7, 0.2, 0.65, 0.55, 0.185
_NARROWEST = 0.45


@dataclass
class Cloud:
    """Vectors of the pixels of one view.

    Args:
        title (str): Name of the view, and where its labels come from.
        vectors (Array): float, ``(N, D)``.
        labels (Array): Class ids, int, ``(N,)``.
    """

    title: str
    vectors: Array
    labels: Array


def balanced_pixels(labels: Array, number: int, num_classes: int,
                    seed: int) -> Array:
    """Draw pixels so that all classes are seen, not only the large ones.

    The classes take turns until there are enough, each with its pixels in a
    random order.

    Args:
        labels (Array): Class ids, ``(N,)``; ids outside ``[0, num_classes)``
            are not drawn.
        number (int): Pixels wanted, at most.
        num_classes (int): Number of classes C.
        seed (int): Of the order.

    Returns:
        Array: Indices, int64.
    """
    order = np.random.RandomState(seed % 2**32).permutation(len(labels))
    order = order[(labels[order] >= 0) & (labels[order] < num_classes)]
    by_class = np.argsort(labels[order], kind='stable')
    sizes = np.bincount(labels[order], minlength=num_classes)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn = np.empty(len(order), np.int64)
    turn[by_class] = np.arange(len(order)) - starts
    return order[np.argsort(turn, kind='stable')][:number]


def project(clouds: Sequence[Cloud], prototypes: Array, method: str
            ) -> tuple[list[Array], Array, tuple[str, str]]:
    """Bring all vectors into one plane.

    Args:
        clouds (Sequence[Cloud]): Pixels by view.
        prototypes (Array): ``(M, D)``.
        method (str): 'pca': the axes are those of the pixels of all views
            together; 'tsne': pixels and prototypes find their places
            together.

    Returns:
        tuple: Points of each cloud ``(N, 2)``, of the prototypes ``(M, 2)``,
        and the names of the axes.

    Raises:
        ValueError: If the method is neither.
    """
    if method not in METHODS:
        raise ValueError(f'method = {method!r} must be one of {METHODS}')
    pixels = np.concatenate([cloud.vectors for cloud in clouds])
    ends = np.cumsum([len(cloud.vectors) for cloud in clouds])
    if method == 'pca':
        axes = pca(pixels)
        plane, fixed = axes.project(pixels), axes.project(prototypes)
        one, two = (f'PC {i + 1} ({share:.0%} of the variance)'
                    for i, share in enumerate(axes.shares))
    else:
        together = tsne(np.concatenate([pixels, prototypes]))
        plane, fixed = together[:ends[-1]], together[ends[-1]:]
        one, two = 't-SNE 1', 't-SNE 2'
    return np.split(plane, ends[:-1]), fixed, (one, two)


def draw_features(clouds: Sequence[Cloud],
                  prototypes: Array,
                  prototype_labels: Array,
                  classes: Sequence[str],
                  palette: Array,
                  method: str = 'pca',
                  title: str = '') -> Array:
    """Draw pixels by class and view, with the prototypes as large stars.

    Each view has a panel of its own on common axes, with the pixels of the
    other views in grey behind it, so that a gap between domains is seen.

    Args:
        clouds (Sequence[Cloud]): Pixels by view, at least one pixel in all.
        prototypes (Array): ``(M, D)``; M may be 0.
        prototype_labels (Array): Their class ids, ``(M,)``.
        classes (Sequence[str]): Names of the classes.
        palette (Array): uint8 RGB, ``(C, 3)``.
        method (str): 'pca' or 'tsne', see :func:`project`.
        title (str): On top of all.

    Returns:
        Array: uint8 RGB, ``(h, w, 3)``.

    Raises:
        ValueError: If there is no pixel.
    """
    # Figure without pyplot: no global state, no display, works in a hook.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    if not sum(len(cloud.vectors) for cloud in clouds):
        raise ValueError('no labelled pixel to draw')
    points, stars, names = project(clouds, prototypes, method)
    colors = np.asarray(palette)[:len(classes)] / 255
    shown = sorted({int(c) for cloud in clouds for c in cloud.labels}
                   | {int(c) for c in prototype_labels})
    low, high = _limits(np.concatenate([*points, stars]))
    # A panel is as high as its contents need at equal scales.
    tall = _SIDE * (high - low)[1] / (high - low)[0]
    columns = -(-len(shown) // _ROWS)
    lines = len(clouds) + 2 + -(-len(shown) // columns)
    width = _LEFT + len(clouds) * (_SIDE + _GAP) + 1.9 * columns + 0.3
    height = _TOP + max(tall + _BOTTOM, _LINE * lines)
    figure = Figure(figsize=(width, height), dpi=100)
    canvas = FigureCanvasAgg(figure)
    size = 14 if len(points[0]) > 300 else 26
    for at, cloud in enumerate(clouds):
        axes = figure.add_axes((
            (_LEFT + at * (_SIDE + _GAP)) / width,
            1 - (_TOP + tall) / height, _SIDE / width, tall / height))
        for other, behind in enumerate(points):
            if other != at:
                axes.scatter(behind[:, 0], behind[:, 1], s=0.7 * size,
                             c=_CONTEXT, linewidths=0, marker=_marker(other))
        axes.scatter(points[at][:, 0], points[at][:, 1], s=size,
                     c=colors[cloud.labels], marker=_marker(at),
                     linewidths=0.3, edgecolors=(0, 0, 0, 0.35), alpha=0.8)
        if len(stars):
            axes.scatter(stars[:, 0], stars[:, 1], s=230,
                         c=colors[prototype_labels], marker='*',
                         linewidths=1.1, edgecolors='black', zorder=3)
        axes.set_title(f'{cloud.title}, {len(cloud.labels)} pixels',
                       fontsize=10)
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.set_xlabel(names[0], fontsize=9)
        axes.tick_params(labelsize=8, labelleft=at == 0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        if at == 0:
            axes.set_ylabel(names[1], fontsize=9)
    right = _LEFT + len(clouds) * (_SIDE + _GAP)
    figure.suptitle(title, fontsize=11, color=_INK, y=1 - 0.1 / height,
                    x=(_LEFT + right - _GAP) / 2 / width)
    _add_legends(figure, right / width, 1 - _TOP / height, _LINE / height,
                 clouds, len(stars) > 0, shown, classes, colors, columns)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _marker(at: int) -> str:
    return _MARKERS[at % len(_MARKERS)]


def _limits(points: Array) -> tuple[Array, Array]:
    """Corners of what is shown: all points, not too narrow, not empty."""
    low, high = points.min(0), points.max(0)
    span = np.maximum(high - low, 1e-6)
    span = np.maximum(span, _NARROWEST * span.max()) * 1.1
    middle = (low + high) / 2
    return middle - span / 2, middle + span / 2


def _add_legends(figure: Any, left: float, top: float, line: float,
                 clouds: Sequence[Cloud], stars: bool, shown: Sequence[int],
                 classes: Sequence[str], colors: Array, columns: int
                 ) -> None:
    """Shapes on top, colours below, to the right of the panels."""
    from matplotlib.lines import Line2D

    def symbol(marker: str, color: Any, label: str, size: float = 7
               ) -> Line2D:
        return Line2D([], [], linestyle='', marker=marker, color=color,
                      label=label, markersize=size, markeredgewidth=0.5,
                      markeredgecolor='black')

    shapes = [symbol(_marker(at), 'white', cloud.title)
              for at, cloud in enumerate(clouds)]
    if stars:
        shapes.append(symbol('*', 'white', 'prototype', 11))
    figure.legend(
        handles=shapes, loc='upper left', bbox_to_anchor=(left, top),
        frameon=False, fontsize=8, borderaxespad=0., handletextpad=0.3)
    figure.legend(
        handles=[symbol('s', colors[c], str(classes[c])) for c in shown],
        loc='upper left', bbox_to_anchor=(
            left, top - line * (len(shapes) + 0.7)), frameon=False,
        fontsize=8, borderaxespad=0., handletextpad=0.3, columnspacing=0.8,
        ncol=columns)
