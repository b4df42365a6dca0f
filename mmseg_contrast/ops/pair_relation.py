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


def same_pair(pairs: Tensor, key_pairs: Tensor, groups: Tensor,
              key_groups: Tensor, ignore_index: int = IGNORE) -> PairRule:
    """Positives are of the same pair, negatives of another group.

    Chaitanya et al., NeurIPS 2020: a pair are the two views of an image, a
    group the slices of all volumes at about the same height (GD-). What is
    of the group but not of the pair is left out. With each pair a group of
    its own it is SimCLR (GR); with the group as label,
    :func:`same_label` is GD.

    Args:
        pairs (Tensor): Pair of each anchor, int64, ``(N,)``.
        key_pairs (Tensor): Of the keys, int64, ``(M,)``.
        groups (Tensor): Group of each anchor, int64, ``(N,)``.
        key_groups (Tensor): Of the keys, int64, ``(M,)``.
        ignore_index (int): Group that is left out, as negative ones are.

    Returns:
        PairRule: See the top of this file.
    """
    def rule(rows: slice) -> Tensor:
        own = pairs[rows].unsqueeze(1) == key_pairs
        mine = groups[rows].unsqueeze(1)
        return _relation(own, _valid(mine, key_groups, ignore_index)
                         & (own | (mine != key_groups)))

    return rule


def teacher_topk(teacher: Tensor,
                 teacher_keys: Tensor,
                 number: int,
                 labels: Tensor,
                 key_labels: Tensor,
                 exclude_self: bool = False,
                 ignore_index: int = IGNORE) -> PairRule:
    """Positives are the keys that a teacher finds most similar.

    ReKD (Zheng et al., AAAI 2022); with ``reduce_positives='lse'`` in the
    loss. All other keys are negatives, whatever their label.

    Args:
        teacher (Tensor): The teacher's embeddings of the anchors,
            ``(N, D)``; without gradients.
        teacher_keys (Tensor): Its embeddings of the keys, ``(M, D)``.
        number (int): Positives of each anchor, k >= 1.
        labels (Tensor): Of the anchors, int64, ``(N,)``, only to leave some
            out.
        key_labels (Tensor): Of the keys, int64, ``(M,)``.
        exclude_self (bool): Leave out the pairs of anchor i and key i.
        ignore_index (int): Label that is left out, as negative ones are.

    Returns:
        PairRule: See the top of this file.
    """
    wide = torch.promote_types(teacher.dtype, torch.float32)
    teacher, teacher_keys = (
        one.detach().to(wide) for one in (teacher, teacher_keys))

    def rule(rows: slice) -> Tensor:
        valid = _valid(
            labels[rows].unsqueeze(1), key_labels, ignore_index)
        if exclude_self:
            valid = valid & _others(rows, valid)
        with torch.autocast(teacher.device.type, enabled=False):
            near = teacher[rows] @ teacher_keys.T
        best = near.masked_fill(~valid, -float('inf')).topk(
            min(number, len(teacher_keys)), 1).indices
        return _relation(
            torch.zeros_like(valid).scatter_(1, best, True), valid)

    return rule


def same_top_features(features: Tensor,
                      key_features: Tensor,
                      number: int = 5) -> PairRule:
    """Positives have the same largest features, in whatever order.

    Similarity without labels (Li et al., CVPR 2021, section 3.2; CDAC): the
    sets of the ``number`` largest of D features coincide. All other pairs
    are negatives.

    Args:
        features (Tensor): Of the anchors, ``(N, D)``; no gradient.
        key_features (Tensor): Of the keys, ``(M, D)``; no gradient.
        number (int): Features that are compared, from 1 to D.

    Returns:
        PairRule: See the top of this file.
    """
    mine, keys = (
        torch.zeros_like(one, dtype=torch.float32).scatter_(
            1, one.topk(number, 1).indices, 1.)
        for one in (features.detach(), key_features.detach()))

    def rule(rows: slice) -> Tensor:
        # Sums of ones: exact in each of the formats that autocast may take.
        same = mine[rows] @ keys.T > number - .5
        return _relation(same, torch.ones_like(same))

    return rule


def within(rule: PairRule, places: Tensor, key_places: Tensor) -> PairRule:
    """The same rule between anchors and keys of one place only.

    Args:
        rule (PairRule): Any.
        places (Tensor): Number of each anchor's image or tile, int64,
            ``(N,)``.
        key_places (Tensor): Of the keys, int64, ``(M,)``.

    Returns:
        PairRule: See the top of this file.
    """
    def nearby(rows: slice) -> Tensor:
        return rule(rows) * (places[rows].unsqueeze(1) == key_places)

    return nearby


def except_self(rule: PairRule) -> PairRule:
    """The same rule without the pairs of anchor i and key i.

    Args:
        rule (PairRule): Any.

    Returns:
        PairRule: See the top of this file.
    """
    def others(rows: slice) -> Tensor:
        relation = rule(rows)
        return relation * _others(rows, relation)

    return others


def place_weights(labels: Tensor,
                  places: Tensor,
                  key_labels: Tensor,
                  key_places: Tensor,
                  exclude_self: bool = False,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of anchors by which the loss is a mean over places.

    For :func:`same_label` :func:`within` places: of each place the mean over
    its anchors, and of these the mean over the places that have an anchor.
    The loss itself is the mean over all anchors; these weights turn one into
    the other.

    Args:
        labels (Tensor): Of the anchors, int64, ``(N,)``; negative ones are
            left out.
        places (Tensor): Their places, int64, ``(N,)``.
        key_labels (Tensor): Of the keys, int64, ``(M,)``.
        key_places (Tensor): Their places, int64, ``(M,)``.
        exclude_self (bool): Whether key i is anchor i, and no pair of it.
        dtype (torch.dtype): Of the result.

    Returns:
        Tensor: ``(N,)``, 0 for what is no anchor.
    """
    count = len(labels)
    number = _numbered(torch.cat([places, key_places]))
    names = _numbered(torch.cat([labels, key_labels]))
    sets = _numbered(number * len(number) + names)
    zeros = torch.zeros_like(number)
    positives = zeros.index_add(
        0, sets[count:], (key_labels >= 0).long())[sets[:count]]
    counts = (positives > int(exclude_self)).long()
    here = zeros.index_add(0, number[:count], counts)
    each = here[number[:count]] * (here > 0).sum()
    return counts * counts.sum() / each.clamp_min(1).to(dtype)


def _numbered(values: Tensor) -> Tensor:
    """Numbers from 0 on, the same for equal values; without a sync."""
    ordered, order = values.sort()
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.zeros_like(values).scatter_(0, order, new.cumsum(0) - 1)


def _others(rows: slice, relation: Tensor) -> Tensor:
    """Which pairs ``(n, M)`` are not those of an anchor and itself."""
    start = rows.start or 0
    mine = torch.arange(
        start, start + len(relation), device=relation.device)
    return mine.unsqueeze(1) != torch.arange(
        relation.shape[1], device=relation.device)


def _valid(labels: Tensor, key_labels: Tensor, ignore_index: int) -> Tensor:
    return ((labels >= 0) & (labels != ignore_index)
            & (key_labels >= 0) & (key_labels != ignore_index))


def _relation(positive: Tensor, valid: Tensor) -> Tensor:
    return (2 * positive.to(torch.int8) - 1) * valid
