"""ClassMix: paste half of the classes of one image over another.

Olsson et al., 2021 (ClassMix); Tranheden et al., 2021 (DACS, across domains).
Pure functions; the random numbers are arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import ignored_last


def present_classes(labels: Tensor,
                    num_classes: int,
                    scope: str = 'batch',
                    mix_ignore: bool = True) -> Tensor:
    """Which classes may be chosen for every sample.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``; 255 is ignored.
        num_classes (int): Number of classes C.
        scope (str): 'batch' lets a sample choose among the classes of the
            whole batch (the published DAFormer), 'sample' among its own
            (DACS).
        mix_ignore (bool): Whether the ignored pixels are a class that can be
            chosen, as in both published codes.

    Returns:
        Tensor: bool, ``(N, C + 1)``; the last column stands for 255.
    """
    ids = ignored_last(labels, num_classes).flatten(1)
    present = torch.zeros(
        len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, ids, True)
    if scope == 'batch':
        present = present.any(0, keepdim=True).expand(len(labels), -1)
    if not mix_ignore:
        present = torch.cat([present[:, :-1], torch.zeros_like(
            present[:, -1:])], 1)
    return present


def choose_classes(present: Tensor, scores: Tensor) -> Tensor:
    """Choose ``ceil(n / 2)`` of the ``n`` present classes of each sample.

    The present classes with the smallest scores win: uniform scores make
    every subset of that size equally likely. No host sync.

    Args:
        present (Tensor): bool, ``(N, K)``.
        scores (Tensor): float in [0, 1), ``(N, K)``.

    Returns:
        Tensor: bool, ``(N, K)``.
    """
    scores = scores.masked_fill(~present, 2.)
    rank = scores.argsort(1).argsort(1)
    count = (present.sum(1, keepdim=True) + 1) // 2
    return rank < count


def class_mask(labels: Tensor, chosen: Tensor) -> Tensor:
    """Pixels of the chosen classes.

    Args:
        labels (Tensor): Class ids, int64, ``(N, H, W)``; 255 is ignored.
        chosen (Tensor): bool, ``(N, C + 1)``, see :func:`choose_classes`.

    Returns:
        Tensor: bool, ``(N, H, W)``.
    """
    ids = ignored_last(labels, chosen.shape[1] - 1)
    return chosen.gather(1, ids.flatten(1)).view_as(labels)


def mix(mask: Tensor, over: Tensor, under: Tensor) -> Tensor:
    """``over`` where the mask is True, else ``under``.

    Args:
        mask (Tensor): bool, ``(N, H, W)``.
        over (Tensor): ``(N, H, W)`` or ``(N, C, H, W)``.
        under (Tensor): Same shape.
    """
    if over.dim() == mask.dim() + 1:
        mask = mask.unsqueeze(1)
    return torch.where(mask, over, under)
