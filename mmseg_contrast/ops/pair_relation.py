"""Which key is a positive and which a negative of which anchor.

A relation is +1 for a positive, -1 for a negative and 0 for what is left out.
A rule gives it for some anchors at a time, ``rule(rows) -> int8 (n, M)``, so
that the whole matrix never exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .labels import IGNORE

PairRule = Callable[[slice], Tensor]


def same_label(labels: Tensor, key_labels: Tensor,
               ignore_index: int = IGNORE) -> PairRule:
    """Same label: positive; another label: negative.

    With the number of an image or a place as label it is the rule of SimCLR:
    the other view of the same is the positive, all else negative.

    Args:
        labels (Tensor): Of the anchors, int64, ``(N,)``.
        key_labels (Tensor): Of the keys, int64, ``(M,)``.
        ignore_index (int): Label that is left out, as negative ones are.

    Returns:
        PairRule: See the top of this file.
    """
    def rule(rows: slice) -> Tensor:
        mine = labels[rows].unsqueeze(1)
        return _relation(mine == key_labels, _valid(mine, key_labels,
                                                    ignore_index))

    return rule


def same_label_across_images(labels: Tensor, images: Tensor,
                             key_labels: Tensor, key_images: Tensor,
                             ignore_index: int = IGNORE) -> PairRule:
    """Positives from all images, negatives from the anchor's own only.

    Zhao et al., ICCV 2021: negatives of other images made their results
    worse.

    Args:
        labels (Tensor): Of the anchors, int64, ``(N,)``.
        images (Tensor): Numbers of their images, int64, ``(N,)``.
        key_labels (Tensor): Of the keys, int64, ``(M,)``.
        key_images (Tensor): Numbers of their images, int64, ``(M,)``.
        ignore_index (int): Label that is left out, as negative ones are.

    Returns:
        PairRule: See the top of this file.
    """
    def rule(rows: slice) -> Tensor:
        mine = labels[rows].unsqueeze(1)
        same = mine == key_labels
        near = images[rows].unsqueeze(1) == key_images
        return _relation(same, _valid(mine, key_labels, ignore_index)
                         & (same | near))

    return rule


def _valid(labels: Tensor, key_labels: Tensor, ignore_index: int) -> Tensor:
    return ((labels >= 0) & (labels != ignore_index)
            & (key_labels >= 0) & (key_labels != ignore_index))


def _relation(positive: Tensor, valid: Tensor) -> Tensor:
    return (2 * positive.to(torch.int8) - 1) * valid
