"""Label maps at the resolution of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import IGNORE, ignored_last


def downscale_labels(labels: Tensor,
                     factor: int,
                     num_classes: int,
                     min_ratio: float = 0.75,
                     ignore_index: int = IGNORE) -> Tensor:
    """One label for each cell of ``factor x factor`` pixels, if it is clear.

    A cell gets its most frequent label if that covers at least ``min_ratio``
    of the cell, else it is ignored. Ignored pixels count as a class of their
    own; of equally frequent labels the one with the lowest id is taken.
    DAFormer (Hoyer et al., CVPR 2022) compares ImageNet features where such
    a cell shows a thing class. No host sync, no one-hot map.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``; ids outside
            ``[0, num_classes)`` are ignored.
        factor (int): Side of a cell in pixels; divides H and W.
        num_classes (int): Number of classes C.
        min_ratio (float): In [0, 1].
        ignore_index (int): The label of an ignored cell.

    Returns:
        Tensor: int64, ``(N, H / factor, W / factor)``.

    Raises:
        ValueError: If the factor does not divide the height and the width.
    """
    samples, height, width = labels.shape
    if height % factor or width % factor:
        raise ValueError(
            f'labels of {height} x {width} pixels have no whole number of '
            f'cells of {factor} x {factor}; use a crop whose sides are '
            f'multiples of {factor}')
    ids = ignored_last(labels, num_classes, ignore_index)
    cells = ids.view(samples, height // factor, factor, width // factor,
                     factor).transpose(2, 3).flatten(3)
    counts = torch.zeros(
        *cells.shape[:3], num_classes + 1, dtype=torch.int32,
        device=labels.device)
    counts.scatter_add_(3, cells, counts.new_ones(()).expand_as(cells))
    most, winner = counts.max(3)
    clear = most / factor**2 >= min_ratio
    return torch.where(clear & (winner < num_classes), winner, ignore_index)
