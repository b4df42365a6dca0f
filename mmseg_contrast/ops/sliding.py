"""Sliding windows, several in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .crop_box import Box, crop_to_box
from .fusion import add_windows, mean_of_windows


def slide_windows(forward: Callable[[Tensor, list[int]], Tensor],
                  images: Tensor,
                  boxes: Sequence[Box],
                  limit: int) -> Tensor:
    """Mean of what a net says about overlapping windows.

    No pass has more than ``limit`` windows, whatever the number of images is,
    and as many passes as this asks for have about the same number. Besides
    one pass there is only the sum: outputs are added as they come, in the
    order of the boxes.

    Args:
        forward (Callable): Gets M <= limit windows ``(M, 3, h, w)`` and, for
            each, which image it is of; returns maps ``(M, C, h, w)``.
        images (Tensor): ``(N, 3, H, W)``.
        boxes (Sequence[Box]): K boxes of one size that cover the images, see
            :func:`mmseg_contrast.ops.slide_boxes`.
        limit (int): Number of windows in one pass, at least 1.

    Returns:
        Tensor: ``(N, C, H, W)``, float32 at least: a sum of half-precision
        maps would lose what the mean of them knows.
    """
    total = None
    for first in range(0, len(images), limit):
        part = images[first:first + limit]
        passes = math.ceil(len(boxes) / max(limit // len(part), 1))
        each = math.ceil(len(boxes) / passes)
        for start in range(0, len(boxes), each):
            chosen = boxes[start:start + each]
            maps = forward(
                torch.cat([crop_to_box(part, box) for box in chosen]),
                list(range(first, first + len(part))) * len(chosen))
            if total is None:
                total = maps.new_zeros(
                    len(images), maps.shape[1], *images.shape[-2:],
                    dtype=torch.promote_types(maps.dtype, torch.float32))
            add_windows(total[first:first + len(part)],
                        maps.unflatten(0, (len(chosen), len(part))), chosen)
    assert total is not None, 'no images'
    return mean_of_windows(total, boxes)
