"""Pseudo-labels and how far they are trusted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor

from .labels import ignored_last
from .precision import full_precision


def logit_probabilities(logits: Tensor) -> Tensor:
    """Class probabilities of a head's logits.

    Args:
        logits (Tensor): ``(N, C, h, w)``.

    Returns:
        Tensor: At least float32, of the same shape; two classes for a head
        with one channel.
    """
    logits = full_precision(logits)
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], 1)


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
    return normalized(probs.masked_fill(absent.view(1, -1, 1, 1), 0.))


def normalized(scores: Tensor) -> Tensor:
    """Scores of the classes scaled to sum 1; zeros stay zeros.

    Args:
        scores (Tensor): ``(N, C, H, W)``, >= 0.
    """
    return scores / scores.sum(1, keepdim=True).clamp_min(
        torch.finfo(scores.dtype).tiny)


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


def confidence_histogram(confidence: Tensor,
                         labels: Tensor,
                         num_classes: int,
                         bins: int,
                         valid: Tensor | None = None) -> Tensor:
    """How often each class was predicted with which confidence.

    Bin b counts confidences in ``[b / bins, (b + 1) / bins)``, the last one
    with 1. No host sync.

    Args:
        confidence (Tensor): In [0, 1], of any shape; what is not finite is
            not counted.
        labels (Tensor): Class ids, int64, of the same shape.
        num_classes (int): Number of classes C.
        bins (int): Number of bins; with a power of two the edges are exact.
        valid (Tensor, optional): bool, of the same shape; others don't count.

    Returns:
        Tensor: int64, ``(C, bins)``.
    """
    ids = ignored_last(labels, num_classes)
    counts_here = confidence.isfinite()
    if valid is not None:
        counts_here = counts_here & valid
    ids = ids.where(counts_here, ids.new_full((), num_classes))
    # A NaN as a whole number is anything.
    place = (confidence.nan_to_num() * bins).long().clamp(0, bins - 1)
    counts = ids.new_zeros((num_classes + 1) * bins)
    index = (ids * bins + place).flatten()
    counts.scatter_add_(0, index, torch.ones_like(index))
    return counts.view(num_classes + 1, bins)[:-1]


def class_thresholds(histogram: Tensor, portion: float, ceiling: float
                     ) -> Tensor:
    """The confidence that a portion of each class's pixels reaches.

    The highest lower edge of a bin that at least the portion reaches, and at
    most the ceiling: the quantile ``1 - portion``, less a bin's width.

    Args:
        histogram (Tensor): Counts ``(C, bins)``, whole numbers or weighted.
        portion (float): In (0, 1].
        ceiling (float): In [0, 1]; also for a class without a pixel.

    Returns:
        Tensor: ``(C,)``, at least float32.
    """
    counts = histogram if histogram.is_floating_point() else (
        histogram.double())
    reached = counts.flip(1).cumsum(1).flip(1)
    total = reached[:, :1]
    # Bin 0 is reached by all, whatever the rounding of the sums.
    enough = (reached >= portion * total)[:, 1:].sum(1)
    edges = (enough / histogram.shape[1]).clamp_max(ceiling)
    return edges.where(total.squeeze(1) > 0, edges.new_full((), ceiling))


def over_thresholds(probs: Tensor, thresholds: Tensor, ratio: bool
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, their probabilities, and which reach their class's threshold.

    Args:
        probs (Tensor): ``(N, C, H, W)``.
        thresholds (Tensor): ``(C,)``.
        ratio (bool): Whether the label is the class with the highest
            ``probability / threshold`` (CBST), or else the most likely one.

    Returns:
        tuple: labels int64, confidence and bool, each ``(N, H, W)``; what is
        not finite reaches no threshold.
    """
    if not ratio:
        confidence, labels = hard_labels(probs)
        return labels, confidence, _reaches(confidence, labels, thresholds)
    smallest = torch.finfo(probs.dtype).tiny
    scores = probs / thresholds.to(probs.dtype).clamp_min(
        smallest).view(1, -1, 1, 1)
    labels = scores.argmax(1)
    confidence = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    return labels, confidence, _reaches(confidence, labels, thresholds)


def _reaches(confidence: Tensor, labels: Tensor, thresholds: Tensor
             ) -> Tensor:
    """Which confidences reach the threshold of their class."""
    return (confidence >= thresholds[labels]) & confidence.isfinite()


def rectified(probs: Tensor, weights: Tensor) -> Tensor:
    """Probabilities times weights of the classes, renormalised.

    ProDA (Zhang et al., CVPR 2021).

    Args:
        probs (Tensor): ``(N, C, H, W)``.
        weights (Tensor): ``(N, C, h, w)``, >= 0; resized bilinearly.

    Returns:
        Tensor: ``(N, C, H, W)``, sums to 1 over the classes.
    """
    if weights.shape[-2:] != probs.shape[-2:]:
        weights = F.interpolate(weights, probs.shape[-2:], mode='bilinear',
                                align_corners=False)
    return normalized(probs * weights)
