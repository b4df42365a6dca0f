r"""Weights of pairs as inner products of what anchors and keys have.

A pair's weight is :math:`w_{ij} = \sum_r a_{ir} b_{jr}`, so that nothing of
the size N x M is kept; see ``anchor_weights`` and ``key_weights`` of
:func:`.contrast_keys.pair_contrast_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joint_weights(probabilities: Tensor,
                  key_probabilities: Tensor,
                  certain: Tensor | None = None,
                  key_certain: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    r"""Probability that anchor and key are of the same class.

    :math:`w_{ij} = \sum_c p_{ic} q_{jc}`, but 1 where both are certain, such
    as two labelled pixels: UCD (Yang et al., TPAMI 2022).

    Args:
        probabilities (Tensor): p, ``(N, C)``.
        key_probabilities (Tensor): q, ``(M, C)``.
        certain (Tensor, optional): bool, ``(N,)``. None: no anchor.
        key_certain (Tensor, optional): bool, ``(M,)``. None: no key.

    Returns:
        tuple: a ``(N, R)`` and b ``(M, R)``; R is C, or 2C + 1 with certain
        ones.
    """
    if certain is None or key_certain is None:
        return probabilities, key_probabilities
    # p q (1 - g h) + g h with g, h the certain ones.
    g = certain.to(probabilities.dtype).unsqueeze(1)
    h = key_certain.to(key_probabilities.dtype).unsqueeze(1)
    return (torch.cat([probabilities, -g * probabilities, g], 1),
            torch.cat([key_probabilities, h * key_probabilities, h], 1))


def complement_weights(weights: Tensor, key_weights: Tensor
                       ) -> tuple[Tensor, Tensor]:
    r"""One minus other weights: CLUDA's :math:`1 - w w^T`.

    Args:
        weights (Tensor): ``(N,)`` or ``(N, R)``.
        key_weights (Tensor): ``(M,)`` or ``(M, R)``.

    Returns:
        tuple: ``(N, R + 1)`` and ``(M, R + 1)``.
    """
    # Not view(len, -1), which is ambiguous without a row.
    a, b = (one.unsqueeze(1) if one.dim() == 1 else one
            for one in (weights, key_weights))
    return (torch.cat([torch.ones_like(a[:, :1]), -a], 1),
            torch.cat([torch.ones_like(b[:, :1]), b], 1))


def split_weights(attention: Tensor,
                  weights: Tensor | None = None,
                  key_attention: Tensor | None = None
                  ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    r"""Weights of two losses that share each pair.

    Products of p with :math:`w w^T` and with :math:`1 - w w^T`: CLUDA
    (Vayyat et al., 2022).

    Args:
        attention (Tensor): w, in [0, 1], ``(N,)``.
        weights (Tensor, optional): p, ``(N,)``. None: 1.
        key_attention (Tensor, optional): w of the keys, ``(N,)``. None: the
            anchors'.

    Returns:
        tuple: Of each loss the weights of anchors and of keys, of rank 1
        ``(N,)`` and of rank 2 ``(N, 2)``.
    """
    if key_attention is None:
        key_attention = attention
    if weights is None:
        weights = torch.ones_like(attention)
    rest = complement_weights(attention, key_attention)
    p = weights.unsqueeze(1)
    return ((weights * attention, weights * key_attention),
            (p * rest[0], p * rest[1]))
