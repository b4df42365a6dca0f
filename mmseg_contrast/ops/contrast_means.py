"""The class form of :mod:`.contrast_keys` with ``energy='mean'``.

The mean of inner products is the inner product with the mean, so of other
classes only the mean keys matter: of all N x C x L similarities the N x L
with the own class are needed. Anchors are laid out in blocks of one class
(:mod:`.grouped`), and a batched product compares each block with the keys of
its class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked_loss import (
    Inputs,
    Walk,
    anchors_at_once,
    gradients_of,
    leaves_of,
)
from .contrast import ABSENT, contrast_terms
from .grouped import blocks_of_classes

#: Anchors of a block. With few, its keys are copied for little; with many,
#: the last block of each class is mostly empty.
LEAST_BLOCK = 16
LARGEST_BLOCK = 64

#: Numbers of a chunk, all tensors together: 32 MiB in float32.
MEAN_FORM_ELEMENTS = 2**23


def mean_energy_walk(anchors: Tensor, labels: Tensor, keys: Tensor,
                     filled: Tensor, own: str, reduce_positives: str,
                     ignore_index: int, chunk_size: int | None) -> Walk:
    """What :func:`.contrast_keys.class_contrast_loss` does with class means.

    Args:
        anchors (Tensor): See there, as all others; the shape counts.
        labels (Tensor): See there.
        keys (Tensor): See there; the shape counts.
        filled (Tensor): See there.
        own (str): See there.
        reduce_positives (str): See there.
        ignore_index (int): See there.
        chunk_size (int, optional): See there.

    Returns:
        Walk: For keys and their weights that are flat, ``(C L, D)`` and
        ``(C L,)``.

    Raises:
        ValueError: If ``chunk_size`` is below 1.
    """
    classes, length, width = keys.shape
    size = min(LARGEST_BLOCK, max(
        LEAST_BLOCK, len(anchors) // max(1, 2 * classes)))
    # Some ten tensors of the similarities' size, a few of the anchors', and
    # the keys of each block with their gradients.
    chunk_size = anchors_at_once(
        chunk_size, MEAN_FORM_ELEMENTS,
        10 * length + 3 * width + 2 * length * width // size,
        anchors.device)
    size = min(size, chunk_size)
    step = chunk_size // size

    def form(energies: Tensor, positives: Tensor, ids: Tensor, owner: Tensor,
             weights: Tensor | None, key_weights: Tensor | None,
             extra: Tensor | None, with_gradient: bool
             ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        with torch.set_grad_enabled(with_gradient):
            leaves = leaves_of(
                energies, positives, weights, key_weights, extra)
            # The same for all anchors of a block.
            pair = None if leaves[3] is None else (
                leaves[3].view(classes, 1, length)[owner]
                .expand(-1, size, -1).flatten(0, 1))
            each, counted = contrast_terms(
                leaves[0], leaves[1], ids, own, reduce_positives, leaves[2],
                pair, ignore_index, leaves[4])
            total = each.sum()
        if not with_gradient:
            return total, counted.sum(), []
        return total.detach(), counted.sum(), gradients_of(total, leaves)

    def walk(inputs: Inputs, needs: list[bool]
             ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        anchors, keys, anchor_weights, key_weights, extra = inputs
        keys = keys.view(classes, length, width)
        there = filled.unsqueeze(2)
        count = filled.sum(1, keepdim=True)
        divisor = count.clamp_min(1).to(keys.dtype)
        means = keys.where(there, keys.new_zeros(())).sum(1) / divisor
        index, exists, owners = blocks_of_classes(
            labels, classes, size, ignore_index)
        ids = owners.unsqueeze(1).where(
            exists, owners.new_full((), ignore_index))
        # Gradients of free slots go to one more row, which is cut off.
        target = index.where(exists, index.new_full((), len(anchors)))
        of_anchors, of_weights, of_extra = (
            one.new_zeros(len(anchors) + 1, *one.shape[1:])
            if need and one is not None else None
            for one, need in zip((anchors, anchor_weights, extra), needs[::2],
                                 strict=True))
        of_keys, of_key_weights = (
            torch.zeros_like(one) if need and one is not None else None
            for one, need in zip((keys, key_weights), needs[1::2],
                                 strict=True))
        of_means = torch.zeros_like(means)
        total = anchors.new_zeros(())
        number = torch.zeros((), dtype=torch.int64, device=anchors.device)
        for start in range(0, len(index), step):
            part = slice(start, start + step)
            owner, rows = owners[part], index[part].flatten()
            to = target[part].flatten()
            mine = anchors.index_select(0, rows)
            blocks = mine.view(-1, size, width)
            near = keys.index_select(0, owner)
            positives = torch.bmm(blocks, near.transpose(1, 2)).masked_fill_(
                ~filled[owner].unsqueeze(1), ABSENT)
            energies = torch.mm(mine, means.T).masked_fill_(
                count.T == 0, ABSENT)
            weights, more = (None if one is None else one.index_select(0, rows)
                             for one in (anchor_weights, extra))
            terms, counted, slopes = form(
                energies, positives.flatten(0, 1), ids[part].flatten(),
                owner, weights, key_weights, more, any(needs))
            total += terms
            number += counted
            if not any(needs):
                continue
            mean_slopes, own_slopes = slopes[:2]
            assert mean_slopes is not None and own_slopes is not None
            own_slopes = own_slopes.view_as(positives)
            if of_anchors is not None:
                of_anchors.index_copy_(0, to, torch.bmm(
                    own_slopes, near).flatten(0, 1).addmm_(
                        mean_slopes, means))
            if of_keys is not None:
                of_keys.index_add_(0, owner, torch.bmm(
                    own_slopes.transpose(1, 2), blocks))
                of_means.addmm_(mean_slopes.T, mine)
            if of_weights is not None and slopes[2] is not None:
                of_weights.index_copy_(0, to, slopes[2])
            if of_key_weights is not None and slopes[3] is not None:
                of_key_weights += slopes[3]
            if of_extra is not None and slopes[4] is not None:
                of_extra.index_copy_(0, to, slopes[4])
        if of_keys is not None:
            of_keys += (of_means / divisor).unsqueeze(1) * there
            of_keys = of_keys.flatten(0, 1)
        of_anchors, of_weights, of_extra = (
            None if one is None else one[:-1]
            for one in (of_anchors, of_weights, of_extra))
        return total, number, [
            of_anchors, of_keys, of_weights, of_key_weights, of_extra]

    return walk
