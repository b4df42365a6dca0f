"""Which labels are those of a class."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = 255


def known_labels(labels: Tensor, num_classes: int,
                 ignore_index: int = IGNORE) -> Tensor:
    """Which labels are those of a class.

    Args:
        labels (Tensor): Class ids, int64, of any shape.
        num_classes (int): Number of classes C.
        ignore_index (int): Label that is ignored, as ids outside ``[0, C)``.

    Returns:
        Tensor: bool, of the same shape.
    """
    return ((labels >= 0) & (labels < num_classes)
            & (labels != ignore_index))


def ignored_last(labels: Tensor, num_classes: int,
                 ignore_index: int = IGNORE) -> Tensor:
    """Class ids, with all ignored labels as one more class at the end.

    Args:
        labels (Tensor): See :func:`known_labels`.
        num_classes (int): See there.
        ignore_index (int): See there.

    Returns:
        Tensor: Ids in ``[0, C]``; C stands for ignored.
    """
    return torch.where(known_labels(labels, num_classes, ignore_index),
                       labels, num_classes)
