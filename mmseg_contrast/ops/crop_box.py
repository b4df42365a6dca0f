"""Boxes of pixels: detail crops and sliding windows.

A box is ``(top, bottom, left, right)`` in pixels or cells; bottom and right
are exclusive.
"""

from __future__ import annotations

from torch import Tensor

Box = tuple[int, int, int, int]


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


def scale_box(box: Box, divisor: int) -> Box:
    """A box of pixels in cells of ``divisor x divisor`` pixels.

    Raises:
        ValueError: If the box does not consist of whole cells.
    """
    if any(edge % divisor for edge in box):
        raise ValueError(
            f'the box {box} (top, bottom, left, right) has no whole number of '
            f'cells of {divisor} x {divisor} pixels; use a crop size and '
            f'offsets that are multiples of {divisor}')
    top, bottom, left, right = (edge // divisor for edge in box)
    return top, bottom, left, right


def crop_to_box(tensor: Tensor, box: Box) -> Tensor:
    """The part of ``(..., H, W)`` inside the box; a view, no copy."""
    top, bottom, left, right = box
    return tensor[..., top:bottom, left:right]


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
