"""Ring buffers, one for each class, without a loop and without a host sync.

``keys (C, L, D)`` hold the latest L vectors of each class; the next one goes
to ``pointer (C,)``; ``filled (C,)`` places have been written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, get_world_size
from torch import Tensor

from .labels import IGNORE


def top_scored(labels: Tensor, scores: Tensor, num_classes: int, number: int,
               ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """The vectors of each class that have the highest scores.

    With uniform scores this is a draw without replacement.

    Args:
        labels (Tensor): int64, ``(N,)``; ids outside ``[0, C)`` are ignored.
        scores (Tensor): Finite, ``(N,)``.
        num_classes (int): Number of classes C.
        number (int): How many of each class, K.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Indices int64 ``(C, K)``, highest score first, and bool
        ``(C, K)``: which of them exist.
    """
    classes = torch.arange(num_classes, device=labels.device).unsqueeze(1)
    mine = (labels == classes) & (labels != ignore_index)
    here = min(number, len(labels))
    index = scores.expand(num_classes, -1).masked_fill(
        ~mine, -float('inf')).topk(here, 1).indices
    exists = mine.gather(1, index)
    missing = (0, number - here)
    return (F.pad(index, missing),
            F.pad(exists, missing))


def only_finite(new: Tensor, exists: Tensor) -> Tensor:
    """Leave out vectors that are NaN or infinite: a queue keeps them long.

    Args:
        new (Tensor): ``(C, K, D)``, in the dtype of the queue.
        exists (Tensor): bool, ``(C, K)``: which of them are vectors.

    Returns:
        Tensor: bool, ``(C, K)``, for :func:`push`.
    """
    return exists & new.isfinite().all(2)


@torch.no_grad()
def push(keys: Tensor, pointer: Tensor, filled: Tensor, new: Tensor,
         exists: Tensor) -> None:
    """Append vectors to the queues of their classes, in place.

    Equal to appending one after the other; of more than L vectors of a class
    the last L remain. Classes without a new vector are not touched.

    Args:
        keys (Tensor): ``(C, L, D)``.
        pointer (Tensor): int64, ``(C,)``, in ``[0, L)``.
        filled (Tensor): int64, ``(C,)``, in ``[0, L]``.
        new (Tensor): ``(C, K, D)``, oldest first; stored in the dtype of the
            keys.
        exists (Tensor): bool, ``(C, K)``: which of them are vectors.
    """
    length = keys.shape[1]
    number = exists.sum(1, keepdim=True)
    # Those that exist first, in their order; then only the last L of them,
    # newest first: their places differ, also where nothing is written.
    order = (~exists).to(torch.int8).sort(dim=1, stable=True).indices
    age = torch.arange(min(new.shape[1], length), device=keys.device)
    rank = number - 1 - age
    places = ((pointer.unsqueeze(1) + rank) % length).unsqueeze(2).expand(
        -1, -1, keys.shape[2])
    index = order.gather(1, rank.clamp_min(0)).unsqueeze(2)
    values = new.to(keys.dtype).gather(1, index.expand_as(places))
    kept = keys.gather(1, places)
    keys.scatter_(1, places, values.where((rank >= 0).unsqueeze(2), kept))
    pointer.add_(number.squeeze(1)).remainder_(length)
    filled.add_(number.squeeze(1)).clamp_(max=length)


def gather_new(new: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """New vectors of all ranks, in the order of ranks: the same on each.

    One collective, which all ranks must enter with the same K, also without
    a vector.

    Args:
        new (Tensor): ``(C, K, D)``.
        exists (Tensor): bool, ``(C, K)``.

    Returns:
        tuple: Of the same kinds, with K times the number of ranks.
    """
    if get_world_size() == 1:
        return new, exists
    packed = torch.cat([new, exists.unsqueeze(2).to(new.dtype)], 2)
    every = torch.cat(all_gather(packed), 1)
    return every[..., :-1], every[..., -1] > 0
