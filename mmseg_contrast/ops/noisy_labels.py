"""Losses that bear wrong labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import IGNORE, known_labels
from .precision import full_precision


def symmetric_cross_entropy(logits: Tensor,
                            labels: Tensor,
                            alpha: float = 0.1,
                            beta: float = 1.0,
                            log_zero: float = math.log(1e-4),
                            ignore_index: int = IGNORE) -> Tensor:
    r"""Cross entropy in both directions.

    .. math::
        \alpha \, \mathrm{CE}(y, p) - \beta \, A \sum_{c \ne y} p_c

    Wang et al., ICCV 2019: the reverse one takes the prediction as truth and
    the one-hot label as prediction, with A in place of log 0. It is bounded,
    so a wrong label cannot pull without end.

    Args:
        logits (Tensor): ``(N, C, H, W)``.
        labels (Tensor): int64, ``(N, H, W)``.
        alpha (float): Weight of cross entropy; 0.1 in ProDA.
        beta (float): Weight of the reverse one; 1 in ProDA.
        log_zero (float): A, < 0.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: 0-d, the mean over labelled pixels; 0 if there is none.
    """
    logits = full_precision(logits)
    known = known_labels(labels, logits.shape[1], ignore_index)
    ids = labels.where(known, labels.new_zeros(())).unsqueeze(1)
    own = logits.log_softmax(1).gather(1, ids).squeeze(1)
    # 1 - p_y is the sum over the others.
    pixels = -alpha * own + beta * log_zero * torch.expm1(own)
    return (pixels * known).sum() / known.sum().clamp_min(1)


def uniform_divergence(logits: Tensor) -> Tensor:
    """Mean of minus the logarithms of all probabilities, 0-d.

    Up to a constant the divergence of the uniform distribution from the
    prediction: it keeps predictions from becoming too sure. MRKLD of CRST
    (Zou et al., ICCV 2019), over all pixels.

    Args:
        logits (Tensor): ``(N, C, H, W)``.
    """
    logits = full_precision(logits)
    return -F.log_softmax(logits, 1).mean()
