"""Vectors in blocks of one class each, with shapes that labels don't change.

What differs by class, such as the keys to compare with, is then one for each
block: a batched product does all of them, without a loop over classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import IGNORE, ignored_last


def blocks_of_classes(labels: Tensor,
                      num_classes: int,
                      size: int,
                      ignore_index: int = IGNORE
                      ) -> tuple[Tensor, Tensor, Tensor]:
    """Lay vectors out in blocks, each with vectors of one class only.

    Classes come one after the other, and a class's vectors in their order.
    Its last block may have free slots. K is the most that any labels need:
    a block for every B vectors, and one more for each class, at most.

    Args:
        labels (Tensor): Class ids, int64, ``(N,)``; ids outside ``[0, C)``
            are ignored.
        num_classes (int): Number of classes C, at least 1.
        size (int): Slots of a block B, at least 1.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Indices int64 ``(K, B)``, 0 in a free slot; bool ``(K, B)``:
        which slots hold a vector; and classes int64 ``(K,)``, any one for a
        block without a vector. Each vector of a class is in one slot, an
        ignored one in none.
    """
    number = len(labels)
    # n vectors of a class need at most (n + B - 1) / B blocks.
    blocks = (number + min(num_classes, number) * (size - 1)) // size
    ids, order = ignored_last(labels, num_classes, ignore_index).sort(
        stable=True)
    first = torch.searchsorted(
        ids, torch.arange(num_classes + 1, device=labels.device))
    needed = (first.diff() + size - 1) // size
    ends = needed.cumsum(0)
    block = torch.arange(blocks, device=labels.device)
    owner = torch.searchsorted(ends, block, right=True)
    # The blocks left over come last. As more blocks of the last class they
    # would begin behind its last vector.
    owner.clamp_(max=num_classes - 1)
    place = (block - ends[owner] + needed[owner]) * size + first[owner]
    slots = place.unsqueeze(1) + torch.arange(size, device=labels.device)
    exists = slots < first[owner + 1].unsqueeze(1)
    index = order[slots.clamp_max(number - 1)]
    return index.where(exists, index.new_zeros(())), exists, owner
