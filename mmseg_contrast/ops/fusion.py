"""Logits of a coarse view of the whole image and of fine views of parts.

HRDA (Hoyer et al., ECCV 2022): the context sees the image at low resolution,
the detail a crop at high resolution; an attention, predicted from the
context, says class by class where the detail is to be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .crop_box import (
    AnyBox,
    Box,
    box_size,
    crop_to_box,
    put_on_canvas,
    scale_box,
)
from .precision import full_precision


def fuse_detail(context: Tensor,
                detail: Tensor,
                attention: Tensor,
                box: AnyBox | None = None,
                factor: int = 2,
                align_corners: bool = False) -> Tensor:
    r"""Detail where the attention says so, context elsewhere.

    .. math:: up((1 - m a) \odot c) + up(m a) \odot d

    m is 1 inside the box; the attention is masked before it is up-sampled,
    so the border of the crop is soft.

    Computed in float32 at least: half precision would round the logits
    once more than those of a single scale.

    Args:
        context (Tensor): c, logits of the whole image, ``(N, C, h, w)``.
        detail (Tensor): d, logits of the box, ``(N, C, H', W')``.
        attention (Tensor): a in [0, 1], ``(N, C, h, w)`` or
            ``(N, 1, h, w)``.
        box (AnyBox, optional): Where the detail lies, in its own cells. None
            if it covers the image, as that of sliding windows does.
        factor (int): Cells of the detail for each of the context's. Without
            a box the detail's own size is what counts.
        align_corners (bool): Of the bilinear up-sampling.

    Returns:
        Tensor: Logits at the detail's resolution, float32 or wider:
        ``(N, C, h * factor, w * factor)``, without a box those of the detail.

    Raises:
        ValueError: If the detail does not have the size of its box, or the
            box no whole number of the context's cells.
    """
    context, detail, attention = (
        full_precision(one) for one in (context, detail, attention))
    size = detail.shape[-2:]
    if box is not None:
        if size != box_size(box):
            raise ValueError(
                f'logits of {size[0]} x {size[1]} cells do not fill the box '
                f'{box} (top, bottom, left, right)')
        coarse = context.shape[-2:]
        size = torch.Size(side * factor for side in coarse)
        inside = scale_box(box, factor)
        attention = put_on_canvas(
            crop_to_box(attention, inside), inside, coarse)
        detail = put_on_canvas(detail, box, size)

    def up(maps: Tensor) -> Tensor:
        return F.interpolate(
            maps, size=tuple(size), mode='bilinear',
            align_corners=align_corners)

    return up((1 - attention) * context) + up(attention) * detail


def add_windows(total: Tensor, windows: Tensor,
                boxes: Sequence[Box]) -> None:
    """Add windows to a canvas, in place.

    Args:
        total (Tensor): The canvas, ``(N, C, H, W)``.
        windows (Tensor): ``(K, N, C, h, w)``, one for each box.
        boxes (Sequence[Box]): K boxes of h x w inside H x W.
    """
    for window, box in zip(windows, boxes, strict=True):
        crop_to_box(total, box).add_(window)


def mean_of_windows(total: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Divide a sum of windows by how many cover each cell, in place.

    Args:
        total (Tensor): What :func:`add_windows` has summed,
            ``(N, C, H, W)``.
        boxes (Sequence[Box]): All boxes; together they cover H x W.

    Returns:
        Tensor: The same tensor.
    """
    count = total.new_zeros(total.shape[-2:])
    for box in boxes:
        crop_to_box(count, box).add_(1)
    return total.div_(count)


def merge_windows(windows: Tensor, boxes: Sequence[Box],
                  size: tuple[int, int]) -> Tensor:
    """Mean of overlapping windows.

    Args:
        windows (Tensor): ``(K, N, C, h, w)``, one for each box.
        boxes (Sequence[Box]): K boxes of h x w that cover all of ``size``,
            see :func:`mmseg_contrast.ops.slide_boxes`.
        size (tuple): Height and width of the result.

    Returns:
        Tensor: ``(N, C, *size)``, float32 or wider.
    """
    total = windows.new_zeros(
        *windows.shape[1:3], *size,
        dtype=torch.promote_types(windows.dtype, torch.float32))
    add_windows(total, windows, boxes)
    return mean_of_windows(total, boxes)
