"""Pseudo-labels and how far they are trusted."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from torch import Tensor


def hard_labels(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely class and its probability.

    Args:
        probs (Tensor): ``(N, C, H, W)``.

    Returns:
        tuple: confidence ``(N, H, W)`` and labels int64 ``(N, H, W)``.
    """
    confidence, labels = probs.max(1)
    return confidence, labels


def without_classes(probs: Tensor, absent: Tensor) -> Tensor:
    """Probabilities with some classes taken out and the rest renormalised.

    Equal to a softmax with these classes' logits at minus infinity.

    Args:
        probs (Tensor): ``(N, C, H, W)``.
        absent (Tensor): bool, ``(C,)``; True takes the class out.
    """
    kept = probs.masked_fill(absent.view(1, -1, 1, 1), 0.)
    return kept / kept.sum(1, keepdim=True).clamp_min(
        torch.finfo(kept.dtype).tiny)


def confident_fraction(confidence: Tensor, threshold: float,
                       scope: str = 'batch') -> Tensor:
    """Share of pixels whose confidence reaches the threshold.

    DACS's weight q of the pseudo-labels, counted over all pixels.

    Args:
        confidence (Tensor): ``(N, H, W)``.
        threshold (float): In [0, 1]; equal counts as confident.
        scope (str): 'batch' is one number for the batch on all ranks,
            'local' for this rank's batch, 'sample' one for each sample.

    Returns:
        Tensor: float32, 0-d for 'batch' and 'local', ``(N,)`` for 'sample'.
    """
    confident = (confidence >= threshold).float()
    if scope == 'sample':
        return confident.mean((1, 2))
    share = confident.mean()
    if scope == 'batch':
        all_reduce(share, 'mean')
    return share
