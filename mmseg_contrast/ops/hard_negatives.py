r"""Synthetic negatives mixed of the hardest ones.

MoCHi (Kalantidis et al., NeurIPS 2020): of the keys that are an anchor's
negatives the most similar ones are taken, and mixed with one another,
:math:`a k_i + (1 - a) k_j`, and with the anchor,
:math:`b f + (1 - b) k, b < 1/2`. Scaled to length 1 they are more keys, of
that anchor only and without gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrast import ABSENT, finite_logsumexp
from .contrast_keys import CLASS_FORM_ELEMENTS
from .pair_relation import PairRule


@torch.no_grad()
def hardest_negatives(anchors: Tensor,
                      keys: Tensor,
                      relation: PairRule,
                      number: int,
                      chunk_size: int | None = None
                      ) -> tuple[Tensor, Tensor]:
    """The negatives that each anchor has the largest inner product with.

    Args:
        anchors (Tensor): ``(N, D)``.
        keys (Tensor): ``(M, D)``.
        relation (PairRule): Which keys are negatives, below 0; see
            :mod:`.pair_relation`.
        number (int): How many K, >= 1; all of them where there are less.
        chunk_size (int, optional): Anchors at a time. None: as many as give
            about 8 million similarities.

    Returns:
        tuple: Indices of keys int64 ``(N, K)``, most similar first, and
        int64 ``(N,)``: how many of them are negatives, in ``[0, K]``.
    """
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    here = min(number, len(keys))
    if chunk_size is None:
        chunk_size = max(1, CLASS_FORM_ELEMENTS // max(1, len(keys)))
    index = torch.zeros(
        len(anchors), here, dtype=torch.int64, device=anchors.device)
    count = index.new_zeros(len(anchors))
    with torch.autocast(anchors.device.type, enabled=False):
        keys = keys.to(dtype)
        for start in range(0, len(anchors) if here else 0, chunk_size):
            rows = slice(start, start + chunk_size)
            similarities = (anchors[rows].to(dtype) @ keys.T).masked_fill_(
                relation(rows) >= 0, ABSENT)
            top = similarities.topk(here, 1)
            index[rows] = top.indices
            count[rows] = (top.values != ABSENT).sum(1)
    return F.pad(index, (0, number - here)), count


def mixed_energies(anchors: Tensor,
                   keys: Tensor,
                   hardest: Tensor,
                   count: Tensor,
                   draws: Tensor,
                   mixes: int,
                   query_mixes: int,
                   max_query_share: float,
                   tau: float) -> Tensor:
    r"""Energy of each anchor with its own synthetic negatives.

    All of them exist at once, which takes memory of the size
    ``N x (mixes + query_mixes) x D``.

    Args:
        anchors (Tensor): f, ``(N, D)``; the only ones with a gradient.
        keys (Tensor): k, ``(M, D)``.
        hardest (Tensor): See :func:`hardest_negatives`.
        count (Tensor): See there.
        draws (Tensor): Uniform numbers in [0, 1), ``(N, 3 mixes + 2
            query_mixes)``: for each mix of two keys which one, which other
            and the first one's share a; then for each mix with the anchor
            which key and the anchor's share b, before it is scaled.
        mixes (int): Mixes of two keys s, >= 0.
        query_mixes (int): Mixes with the anchor s', >= 0.
        max_query_share (float): Largest b, in (0, 1].
        tau (float): Temperature, > 0.

    Returns:
        Tensor: :math:`\log \sum e^{f^T m / \tau}` over the mixes m,
        ``(N,)``; minus infinity for an anchor without a negative.
    """
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    anchors, shares = anchors.to(dtype), draws.to(dtype)
    if not len(keys):
        return anchors.sum(1) * 0 + ABSENT
    first, second, a, partner, b = shares.split(
        [mixes, mixes, mixes, query_mixes, query_mixes], 1)

    def chosen(place: Tensor) -> Tensor:
        # Uniform among the negatives that there are.
        number = (place * count.unsqueeze(1)).long()
        return keys[hardest.gather(1, number)].to(dtype)

    with torch.no_grad():
        a, b = a.unsqueeze(2), b.unsqueeze(2) * max_query_share
        mixed = F.normalize(torch.cat([
            a * chosen(first) + (1 - a) * chosen(second),
            b * anchors.unsqueeze(1) + (1 - b) * chosen(partner)], 1), dim=2)
    with torch.autocast(anchors.device.type, enabled=False):
        energies = (mixed @ anchors.unsqueeze(2)).squeeze(2) / tau
    return finite_logsumexp(
        energies.masked_fill((count == 0).unsqueeze(1), ABSENT), 1)
