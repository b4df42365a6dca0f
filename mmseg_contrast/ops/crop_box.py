"""Boxes of pixels: detail crops and sliding windows.

A box is ``(top, bottom, left, right)`` in pixels or cells; bottom and right
are exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .balanced_crop import crop_windows
from .transfer import send

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class BoxOfEach:
    """One of a few boxes for each image, chosen on the device.

    What was chosen is never asked for on the host, so nothing waits for the
    device; shapes are the same for each choice.

    Args:
        boxes (tuple[Box, ...]): K boxes of one size.
        index (Tensor): Which one, int64, ``(N,)``.
    """

    boxes: tuple[Box, ...]
    index: Tensor

    def offsets(self) -> Tensor:
        """First row and first column of each image's box, int64 ``(N, 2)``."""
        known = torch.tensor([(top, left) for top, _, left, _ in self.boxes])
        return send(known, self.index.device)[self.index]


#: The same box for all images, or one for each.
AnyBox = Box | BoxOfEach


def box_size(box: AnyBox) -> tuple[int, int]:
    """Height and width of a box, in its own cells."""
    top, bottom, left, right = (
        box.boxes[0] if isinstance(box, BoxOfEach) else box)
    return bottom - top, right - left


def draw_crop_box(height: int,
                  width: int,
                  crop: tuple[int, int],
                  uniforms: tuple[float, float],
                  divisor: int = 8,
                  include_last: bool = True) -> Box:
    """A crop at a random place that keeps to a grid.

    The detail crop of HRDA (Hoyer et al., ECCV 2022). Its offsets are
    multiples of ``divisor``, so that the crop covers whole cells of the
    context's logits.

    Args:
        height (int): Height of the image.
        width (int): Width of the image.
        crop (tuple): Height and width of the crop.
        uniforms (tuple): Two numbers in [0, 1): vertical, horizontal.
        divisor (int): Grid of the offsets, in pixels.
        include_last (bool): Whether the last offset of the grid can occur.
            The published code draws from ``(margin + 1) // divisor`` places,
            so that the bottom and the right border are never inside.

    Returns:
        Box: top, bottom, left, right.

    Raises:
        ValueError: If the crop is larger than the image.
    """
    offsets = []
    for side, length, uniform in zip(
            (height, width), crop, uniforms, strict=True):
        margin = side - length
        if margin < 0:
            raise ValueError(
                f'a detail crop of {crop[0]} x {crop[1]} pixels does not fit '
                f'into an image of {height} x {width}; use a smaller one')
        places = margin // divisor + 1
        if not include_last:
            places = (margin + 1) // divisor
        offsets.append(int(uniform * places) * divisor)
    top, left = offsets
    return top, top + crop[0], left, left + crop[1]


@overload
def scale_box(box: Box, divisor: int) -> Box:
    ...


@overload
def scale_box(box: AnyBox, divisor: int) -> AnyBox:
    ...


def scale_box(box: AnyBox, divisor: int) -> AnyBox:
    """A box of pixels in cells of ``divisor x divisor`` pixels.

    Raises:
        ValueError: If the box does not consist of whole cells.
    """
    if isinstance(box, BoxOfEach):
        return BoxOfEach(tuple(scale_box(one, divisor) for one in box.boxes),
                         box.index)
    if any(edge % divisor for edge in box):
        raise ValueError(
            f'the box {box} (top, bottom, left, right) has no whole number of '
            f'cells of {divisor} x {divisor} pixels; use a crop size and '
            f'offsets that are multiples of {divisor}')
    top, bottom, left, right = (edge // divisor for edge in box)
    return top, bottom, left, right


def crop_to_box(tensor: Tensor, box: AnyBox) -> Tensor:
    """The part of ``(..., H, W)`` inside the box.

    Args:
        tensor (Tensor): ``(..., H, W)``; ``(N, ..., H, W)`` with a box for
            each of N images.
        box (AnyBox): The box.

    Returns:
        Tensor: ``(..., h, w)``: of one box a view, of several a copy.
    """
    if isinstance(box, BoxOfEach):
        return crop_windows(tensor, box.offsets(), box_size(box))
    top, bottom, left, right = box
    return tensor[..., top:bottom, left:right]


def put_on_canvas(part: Tensor, box: AnyBox, size: Sequence[int]) -> Tensor:
    """Zeros with a part in its box.

    Args:
        part (Tensor): ``(N, C, h, w)``.
        box (AnyBox): Of h x w cells.
        size (Sequence[int]): Height H and width W of the canvas.

    Returns:
        Tensor: ``(N, C, H, W)``.
    """
    if isinstance(box, BoxOfEach):
        return _put_each(part, box, size)
    top, bottom, left, right = box
    return F.pad(part, (left, size[1] - right, top, size[0] - bottom))


def _put_each(part: Tensor, box: BoxOfEach, size: Sequence[int]) -> Tensor:
    """As :func:`put_on_canvas`: each cell of the canvas looks for its own."""
    height, width = box_size(box)
    rows, columns = (
        torch.arange(side, device=part.device) - start.unsqueeze(1)
        for side, start in zip(size, box.offsets().unbind(1), strict=True))
    places = (rows.clamp(0, height - 1).unsqueeze(2) * width
              + columns.clamp(0, width - 1).unsqueeze(1)).flatten(1)
    found = part.flatten(-2).gather(
        -1, places.unsqueeze(1).expand(-1, part.shape[1], -1))
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & (
        (columns >= 0) & (columns < width)).unsqueeze(1)
    return found.unflatten(-1, tuple(size)).where(inside.unsqueeze(1), 0)


def within_box(rows: Tensor, columns: Tensor, box: AnyBox) -> Tensor:
    """Which places lie in a box.

    Args:
        rows (Tensor): Vertical places, in cells of the box, ``(r,)``.
        columns (Tensor): Horizontal ones, ``(c,)``.
        box (AnyBox): The box.

    Returns:
        Tensor: bool, ``(1, r, c)``; with a box for each image
        ``(N, 1, r, c)``.
    """
    down, right = places_in_box(rows, columns, box)
    inside = ((down >= 0) & (down < 1)).unsqueeze(-1) & (
        (right >= 0) & (right < 1)).unsqueeze(-2)
    return inside.unsqueeze(-3)


def places_in_box(rows: Tensor, columns: Tensor, box: AnyBox
                  ) -> tuple[Tensor, Tensor]:
    """Places as shares of a box: 0 is its first edge, 1 its last one.

    Args:
        rows (Tensor): Vertical places, in cells of the box, ``(r,)``.
        columns (Tensor): Horizontal ones, ``(c,)``.
        box (AnyBox): The box.

    Returns:
        tuple[Tensor, Tensor]: Of the rows and of the columns, of their shape;
        with a box for each image ``(N, r)`` and ``(N, c)``.
    """
    height, width = box_size(box)
    top: Tensor | int
    left: Tensor | int
    if isinstance(box, BoxOfEach):
        top, left = box.offsets().unsqueeze(2).unbind(1)
    else:
        top, left = box[0], box[2]
    return (rows - top) / height, (columns - left) / width


def slide_boxes(height: int, width: int, crop: tuple[int, int],
                stride: tuple[int, int]) -> list[Box]:
    """Windows of one size that cover the image, row by row.

    The last window of a row or column is moved back to the border of the
    image. An image smaller than the window has one window: itself.

    Args:
        height (int): Height of the image.
        width (int): Width of the image.
        crop (tuple): Height and width of the windows.
        stride (tuple): Vertical and horizontal distance of the windows; at
            most the size of a window, if no pixel shall be left out.

    Returns:
        list[Box]: top, bottom, left, right of each.
    """
    spans = []
    for side, length, step in zip(
            (height, width), crop, stride, strict=True):
        last = max(side - length, 0)
        starts = [*range(0, last, step), last]
        spans.append([(start, min(start + length, side)) for start in starts])
    rows, columns = spans
    return [(top, bottom, left, right)
            for top, bottom in rows for left, right in columns]
