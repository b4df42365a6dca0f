"""Shares of vectors among the prototypes of their class, equally used."""

from __future__ import annotations

import torch
from torch import Tensor


def class_sinkhorn(similarities: Tensor,
                   labels: Tensor,
                   num_classes: int,
                   iterations: int = 3,
                   epsilon: float = 0.05) -> Tensor:
    r"""Optimal transport of the vectors of each class to its K prototypes.

    Sinkhorn and Knopp's iteration on :math:`e^{s / \epsilon}`: all
    prototypes of a class get the same mass, all its vectors give the same
    (ProtoSeg, Zhou et al., CVPR 2022). All classes at once, with memory of
    the size N x K, and in logarithms, so that no epsilon is too small.

    Args:
        similarities (Tensor): s of each vector with the prototypes of its
            own class, ``(N, K)``; minus infinity for a prototype that must
            get nothing.
        labels (Tensor): Class ids in ``[0, C)``, int64, ``(N,)``; C for a
            vector without a class, which gets a share of its own.
        num_classes (int): Number of classes C.
        iterations (int): Steps, >= 1.
        epsilon (float): Entropic regularisation, > 0.

    Returns:
        Tensor: Shares ``(N, K)``, each vector's sum is 1, float32 or wider;
        0 where nothing is allowed.
    """
    dtype = torch.promote_types(similarities.dtype, torch.float32)
    scores = similarities.to(dtype) / epsilon
    for _ in range(iterations):
        # First the prototypes, then the vectors, as published.
        total = _class_logsumexp(scores, labels, num_classes + 1)
        scores = scores - _finite(total)[labels]
        scores = scores - _finite(scores.logsumexp(1, keepdim=True))
    return scores.exp()


def _class_logsumexp(scores: Tensor, labels: Tensor, classes: int
                     ) -> Tensor:
    """Over the vectors of each class, ``(C, K)``."""
    index = labels.unsqueeze(1).expand_as(scores)
    none = scores.new_full((classes, scores.shape[1]), -float('inf'))
    top = _finite(none.scatter_reduce(0, index, scores, 'amax'))
    return top + torch.zeros_like(top).index_add(
        0, labels, (scores - top[labels]).exp()).log()


def _finite(values: Tensor) -> Tensor:
    """Without minus infinity, which stands for nothing."""
    return values.masked_fill(values == -float('inf'), 0.)
