"""Which pairs are of one class, by their probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from .pair_relation import PairRule

#: Keeps logarithms of 0, and their gradients, finite; the published one.
EPS = 1e-7


def pair_agreement_loss(probabilities: Tensor, key_probabilities: Tensor,
                        rule: PairRule) -> Tensor:
    """Binary cross entropy of "both are of one class".

    Two predictions agree with the probability ``p_i . q_j`` (Li et al., CVPR
    2021, equation 3; CDAC). The loss is the mean of ``-log(p_i . q_j)`` over
    positive pairs and of ``-log(1 - p_i . q_j)`` over negative ones, both
    together. CDAC's classifier maximizes what its features minimize: that
    needs a gradient reversal between them.

    Args:
        probabilities (Tensor): p, ``(N, C)``, rows with a sum of 1.
        key_probabilities (Tensor): q, ``(M, C)``.
        rule (PairRule): Which pairs are positive, negative or left out, see
            :mod:`.pair_relation`.

    Returns:
        Tensor: 0-d, 0 with zero gradients if there is no pair.
    """
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    with torch.autocast(probabilities.device.type, enabled=False):
        agree = probabilities.to(dtype) @ key_probabilities.to(dtype).T
    relation = rule(slice(None))
    likely = agree.where(relation > 0, 1 - agree)
    terms = -(likely + EPS).log()
    counts = relation != 0
    return terms.where(counts, terms.new_zeros(())).sum() / counts.sum(
    ).clamp_min(1)
