"""Crops that show many classes: random boxes, their scores, the windows.

A box of a given size is known by its offset, ``(top, left)`` in pixels. All
boxes of a batch have one size, so windows are gathered by index arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import IGNORE, ignored_last


def draw_offsets(samples: int,
                 tries: int,
                 height: int,
                 width: int,
                 size: tuple[int, int],
                 generator: torch.Generator) -> Tensor:
    """Offsets of random boxes, all places alike.

    Args:
        samples (int): Images N.
        tries (int): Boxes of each, T.
        height (int): Height of the images.
        width (int): Width of the images.
        size (tuple): Height and width of the boxes.
        generator (torch.Generator): CPU generator.

    Returns:
        Tensor: int64, ``(N, T, 2)``, on the CPU.

    Raises:
        ValueError: If a box is larger than the image.
    """
    if size[0] > height or size[1] > width:
        raise ValueError(
            f'a crop of {size[0]} x {size[1]} pixels does not fit into an '
            f'image of {height} x {width}; use a smaller one')
    return torch.stack([
        torch.randint(side - length + 1, (samples, tries),
                      generator=generator)
        for side, length in zip((height, width), size, strict=True)], 2)


def crop_windows(maps: Tensor, offsets: Tensor, size: tuple[int, int]
                 ) -> Tensor:
    """One window of each image. No host sync.

    Args:
        maps (Tensor): ``(N, ..., H, W)``.
        offsets (Tensor): int64, ``(N, 2)``, of boxes inside the image.
        size (tuple): Height h and width w of the windows.

    Returns:
        Tensor: ``(N, ..., h, w)``.
    """
    top, left = offsets.unbind(1)
    rows = top.view(-1, 1, 1) + torch.arange(
        size[0], device=maps.device).view(-1, 1)
    columns = left.view(-1, 1, 1) + torch.arange(
        size[1], device=maps.device)
    places = (rows * maps.shape[-1] + columns).flatten(1)
    middle = maps.shape[1:-2]
    places = places.view(len(maps), *[1] * len(middle), -1)
    return maps.flatten(-2).gather(
        -1, places.expand(-1, *middle, -1)).unflatten(-1, size)


def balance_scores(labels: Tensor,
                   num_classes: int,
                   max_ratio: float = 0.75,
                   ignore_index: int = IGNORE) -> Tensor:
    """How many classes images show, and how evenly.

    The class-balanced crop of SePiCo (Xie et al., 2023): the sum of
    ``ln(count)`` over the classes, if the most frequent one covers less than
    ``max_ratio``, else 0. A class of one pixel adds nothing. No host sync,
    no one-hot map.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``.
        num_classes (int): Number of classes C.
        max_ratio (float): Share of the labelled pixels, in [0, 1].
        ignore_index (int): Label that is ignored, as ids outside ``[0, C)``.

    Returns:
        Tensor: float32, ``(N,)``, >= 0; 0 without a labelled pixel.
    """
    # Rows first: fewer pixels wait for the same counter.
    ids = ignored_last(labels, num_classes, ignore_index)
    counts = torch.zeros(*ids.shape[:2], num_classes + 1, dtype=torch.int32,
                         device=labels.device)
    counts.scatter_add_(2, ids, counts.new_ones(()).expand_as(ids))
    counts = counts.sum(1)[:, :num_classes]
    balanced = counts.amax(1) < max_ratio * counts.sum(1)
    score = counts.clamp_min(1).float().log().sum(1)
    return score.where(balanced, 0.)


def choose_offsets(labels: Tensor,
                   offsets: Tensor,
                   size: tuple[int, int],
                   num_classes: int,
                   max_ratio: float = 0.75,
                   ignore_index: int = IGNORE) -> Tensor:
    """The first of the most balanced boxes of each image.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``.
        offsets (Tensor): int64, ``(N, T, 2)``.
        size (tuple): Height and width of the boxes.
        num_classes (int): Number of classes C.
        max_ratio (float): See :func:`balance_scores`.
        ignore_index (int): See there.

    Returns:
        Tensor: int64, ``(N, 2)``.
    """
    # One try after the other: all windows at once would be large.
    scores = torch.stack([
        balance_scores(crop_windows(labels, one, size), num_classes,
                       max_ratio, ignore_index)
        for one in offsets.unbind(1)], 1)
    best = scores.argmax(1).view(-1, 1, 1).expand(-1, 1, 2)
    return offsets.gather(1, best).squeeze(1)
