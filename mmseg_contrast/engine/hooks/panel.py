"""Pictures of an iteration, composed from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray

GAP = 4
TITLE = 20
LINE = 18
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK = (40, 40, 40)


@dataclass
class Column:
    """One column of a panel.

    Args:
        title (str): Written on top.
        tiles (Sequence[Array]): uint8 RGB pictures ``(h, w, 3)``, one a row.
        smooth (bool): Whether scaling may mix colours: yes for photographs,
            no for label maps.
    """

    title: str
    tiles: Sequence[Array]
    smooth: bool = False


def default_palette(num_classes: int) -> Array:
    """Distinct colours for datasets without a palette.

    Args:
        num_classes (int): Number of colours.

    Returns:
        Array: uint8 RGB, ``(num_classes, 3)``.
    """
    hues = (np.arange(num_classes) * 0.618034 % 1 * 180).astype(np.uint8)
    light = np.where(np.arange(num_classes) % 2, 150, 235).astype(np.uint8)
    hsv = np.stack([hues, np.full_like(hues, 190), light], axis=-1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def colorize(labels: Array, palette: Array) -> Array:
    """Colours of a label map; what is no class gets a grey hatch.

    Args:
        labels (Array): Class ids, ``(h, w)``; ids outside the palette, such
            as 255, are ignored pixels.
        palette (Array): uint8 RGB, ``(num_classes, 3)``.

    Returns:
        Array: uint8 RGB, ``(h, w, 3)``.
    """
    known = (labels >= 0) & (labels < len(palette))
    image = palette[np.where(known, labels, 0)]
    rows, columns = np.indices(labels.shape)
    stripes = np.where((rows + columns) // 4 % 2, 150, 115).astype(np.uint8)
    return np.where(known[..., None], image, stripes[..., None])


def heat(confidence: Array, threshold: float | None = None) -> Array:
    """Colours of probabilities, on a scale fixed to [0, 1].

    Args:
        confidence (Array): Floats in [0, 1], ``(h, w)``.
        threshold (float, optional): Pixels that don't reach it are drawn at
            half brightness.

    Returns:
        Array: uint8 RGB, ``(h, w, 3)``.
    """
    levels = np.rint(np.clip(confidence, 0, 1) * 255).astype(np.uint8)
    image = cv2.cvtColor(
        cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    if threshold is not None:
        image[confidence < threshold] //= 2
    return image


def denormalize(images: Array, mean: Array | None,
                std: Array | None) -> Array:
    """Undo the preprocessor's normalisation.

    Args:
        images (Array): Floats, ``(n, 3, h, w)``.
        mean (Array, optional): ``(3,)``; None if nothing was normalised.
        std (Array, optional): ``(3,)``.

    Returns:
        Array: uint8, ``(n, h, w, 3)``, channels in the order they came.
    """
    images = images.transpose(0, 2, 3, 1)
    if mean is not None and std is not None:
        images = images * std + mean
    return np.rint(np.clip(images, 0, 255)).astype(np.uint8)


def compose(columns: Sequence[Column],
            classes: Sequence[str],
            palette: Array,
            threshold: float | None = None,
            scale_bar: bool = False,
            tile_width: int = 240) -> Array:
    """Set tiles in rows and columns, with titles and a legend.

    Tiles keep their shape; the first tile lies at row ``TITLE + GAP``, column
    ``GAP``.

    Args:
        columns (Sequence[Column]): At least one; all with as many tiles.
        classes (Sequence[str]): Names of the classes.
        palette (Array): uint8 RGB, ``(num_classes, 3)``.
        threshold (float, optional): Marked on the scale bar.
        scale_bar (bool): Whether a scale from 0 to 1 joins the legend.
        tile_width (int): Width to which tiles are scaled.

    Returns:
        Array: uint8 RGB, ``(height, width, 3)``.
    """
    scaled = [[_fit(tile, tile_width, column.smooth) for tile in column.tiles]
              for column in columns]
    heights = [max(tiles[row].shape[0] for tiles in scaled)
               for row in range(len(scaled[0]))]
    width = GAP + len(columns) * (tile_width + GAP)
    legend = _legend(classes, palette, width,
                     threshold if scale_bar else None, scale_bar)
    top = TITLE + GAP
    panel = np.full((top + sum(heights) + GAP * len(heights)
                     + legend.shape[0], width, 3), 255, np.uint8)
    for at, (column, tiles) in enumerate(zip(columns, scaled, strict=True)):
        left = GAP + at * (tile_width + GAP)
        _write(panel, column.title, left, TITLE - 4)
        row = top
        for tile, height in zip(tiles, heights, strict=True):
            panel[row:row + tile.shape[0], left:left + tile_width] = tile
            row += height + GAP
    panel[panel.shape[0] - legend.shape[0]:] = legend
    return panel


def _fit(tile: Array, width: int, smooth: bool) -> Array:
    """Scale a tile to a width."""
    height = max(1, round(tile.shape[0] * width / tile.shape[1]))
    mode = cv2.INTER_NEAREST
    if smooth:
        mode = cv2.INTER_AREA if width < tile.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(tile, (width, height), interpolation=mode)


def _write(image: Array, text: str, left: int, baseline: int) -> int:
    """Write text, and return where it ends."""
    # OpenCV's fonts know ASCII alone
    text = text.encode('ascii', 'replace').decode()
    cv2.putText(image, text, (left, baseline), _FONT, 0.45, _INK, 1,
                cv2.LINE_AA)
    return left + cv2.getTextSize(text, _FONT, 0.45, 1)[0][0]


def _legend(classes: Sequence[str], palette: Array, width: int,
            threshold: float | None, scale_bar: bool) -> Array:
    """Scale bar, class colours and names, in as many lines as needed."""
    lines = [_blank_line(width)]
    left = GAP
    if scale_bar:
        bar = heat(np.linspace(0, 1, 101)[None].repeat(LINE - 8, 0),
                   threshold)
        left = _write(lines[0], '0', left, LINE - 5) + 3
        lines[0][4:LINE - 4, left:left + 101] = bar
        if threshold is not None:
            # a red mark where full brightness starts
            at = left + round(threshold * 100)
            lines[0][1:LINE - 1, at] = (220, 0, 0)
        label = '1 confidence'
        if threshold is not None:
            label += f', dimmed below {threshold:g}'
        left = _write(lines[0], label, left + 105, LINE - 5) + 16
    for name, color in zip(classes, palette, strict=False):
        size = cv2.getTextSize(str(name), _FONT, 0.45, 1)[0][0]
        if left + LINE + size > width and left > GAP:
            lines.append(_blank_line(width))
            left = GAP
        lines[-1][4:LINE - 4, left:left + LINE - 8] = color
        left = _write(lines[-1], str(name), left + LINE - 5, LINE - 5) + 14
    return np.concatenate(lines)


def _blank_line(width: int) -> Array:
    return np.full((LINE, width, 3), 255, np.uint8)
