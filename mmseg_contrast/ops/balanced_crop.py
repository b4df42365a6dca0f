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


def box_counts(labels: Tensor,
               offsets: Tensor,
               size: tuple[int, int],
               num_classes: int,
               ignore_index: int = IGNORE) -> Tensor:
    """Pixels of each class in each box.

    The boxes' edges cut an image into a few cells. Each pixel is counted
    once, in its cell; sums over the cells left of and above each corner give
    the boxes. No host sync, no one-hot map.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``.
        offsets (Tensor): int64, ``(N, T, 2)``.
        size (tuple): Height and width of the boxes.
        num_classes (int): Number of classes C.
        ignore_index (int): Label that is ignored, as ids outside ``[0, C)``.

    Returns:
        Tensor: int32, ``(N, T, C)``.
    """
    ids = ignored_last(labels, num_classes, ignore_index)
    (rows, top, bottom), (columns, left, right) = (
        _between_edges(offsets[..., axis].contiguous(), size[axis],
                       labels.shape[axis + 1]) for axis in (0, 1))
    samples, side = len(labels), 2 * offsets.shape[1] + 1
    places = rows.unsqueeze(2) * side + columns.unsqueeze(1)
    counts = torch.zeros(samples, side**2 * (num_classes + 1),
                         dtype=torch.int32, device=labels.device)
    places = (places * (num_classes + 1) + ids).flatten(1)
    counts.scatter_add_(1, places, counts.new_ones(()).expand_as(places))
    sums = counts.view(samples, side, side, -1)[..., :num_classes].cumsum(
        1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    image = torch.arange(samples, device=labels.device).unsqueeze(1)
    return (sums[image, bottom, right] - sums[image, top, right]
            - sums[image, bottom, left] + sums[image, top, left])


def _between_edges(start: Tensor, length: int, side: int
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Number of edges up to each line; to those before start and end."""
    end = start + length
    edges = torch.cat([start, end], 1).sort(1).values
    lines = torch.arange(side, device=start.device).expand(len(start), -1)
    return (torch.searchsorted(edges, lines.contiguous(), right=True),
            torch.searchsorted(edges, start, right=True) - 1,
            torch.searchsorted(edges, end, right=True) - 1)


def balance_scores(counts: Tensor, max_ratio: float = 0.75) -> Tensor:
    """How many classes there are, and how evenly.

    The class-balanced crop of SePiCo (Xie et al., 2023): the sum of
    ``ln(count)`` over the classes, if the most frequent one has less than
    ``max_ratio`` of the pixels, else 0. A class of one pixel adds nothing.

    Args:
        counts (Tensor): Labelled pixels of each class, ``(..., C)``.
        max_ratio (float): In [0, 1].

    Returns:
        Tensor: float32, ``(...)``, >= 0; 0 without a pixel.
    """
    balanced = counts.amax(-1) < max_ratio * counts.sum(-1)
    score = counts.clamp_min(1).float().log().sum(-1)
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
        ignore_index (int): Label that is ignored, as ids outside ``[0, C)``.

    Returns:
        Tensor: int64, ``(N, 2)``.
    """
    scores = balance_scores(
        box_counts(labels, offsets, size, num_classes, ignore_index),
        max_ratio)
    best = scores.argmax(1).view(-1, 1, 1).expand(-1, 1, 2)
    return offsets.gather(1, best).squeeze(1)
