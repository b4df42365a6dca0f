"""Which pixels are anchors, and which are keys of which classes.

Everything that draws takes scores, one for each pixel: the pixels with the
highest scores are taken, so uniform numbers are a draw without replacement.
Results have static shapes: slots, of which some may be empty. Nothing loops
over images, classes or pixels or waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, get_world_size
from torch import Tensor

from .labels import IGNORE, known_labels
from .precision import full_precision
from .queue import gather_new, only_finite, push


def rank_in_groups(groups: Tensor, scores: Tensor, num_groups: int
                   ) -> tuple[Tensor, Tensor]:
    """Place of each element among those of its group, by falling score.

    Args:
        groups (Tensor): int64, ``(N,)``, in ``[0, G]``; G stands for none.
        scores (Tensor): ``(N,)``.
        num_groups (int): Number of groups G.

    Returns:
        tuple: Ranks int64 ``(N,)``, 0 for the highest score of a group, and
        sizes of the groups, int64 ``(G,)``.
    """
    by_score = scores.argsort(descending=True)
    order = by_score[groups[by_score].sort(stable=True).indices]
    # Where each group begins; bincount would wait for the device.
    starts = torch.searchsorted(groups[order], torch.arange(
        num_groups + 1, device=groups.device))
    places = torch.arange(len(groups), device=groups.device)
    ranks = torch.empty_like(order).scatter_(
        0, order, places - starts[groups[order]])
    return ranks, starts.diff()


def draw_per_group(groups: Tensor, scores: Tensor, num_groups: int,
                   number: int) -> tuple[Tensor, Tensor]:
    """The elements of each group that have the highest scores.

    Args:
        groups (Tensor): See :func:`rank_in_groups`.
        scores (Tensor): See there.
        num_groups (int): Number of groups G.
        number (int): How many of each group, K.

    Returns:
        tuple: Indices int64 ``(G, K)``, highest score first, 0 in an empty
        slot, and bool ``(G, K)``: which slots are filled.
    """
    ranks, sizes = rank_in_groups(groups, scores, num_groups)
    slots = groups * number + ranks
    taken = (ranks < number) & (groups < num_groups)
    index = _into_slots(slots, taken, num_groups * number)
    places = torch.arange(number, device=groups.device)
    return (index.view(num_groups, number),
            places < sizes.unsqueeze(1))


def _into_slots(slots: Tensor, taken: Tensor, number: int) -> Tensor:
    """Which element is in each slot, int64 ``(number,)``; 0 in empty ones."""
    index = slots.new_zeros(number + 1)
    # What is not taken goes to one more slot, which is cut off.
    index.scatter_(0, slots.where(taken, slots.new_full((), number)),
                   torch.arange(len(slots), device=slots.device))
    return index[:-1]


def hard_and_easy(labels: Tensor,
                  predicted: Tensor,
                  scores: Tensor,
                  num_classes: int,
                  max_samples: int = 1024,
                  max_views: int = 100,
                  ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """ContrastiveSeg's anchors: half wrongly, half rightly predicted pixels.

    Wang et al., ICCV 2021. The A pairs of an image and a class that has more
    than ``max_views`` pixels there are given ``n = min(max_samples // A,
    max_views)`` anchors each: n // 2 of another predicted class (hard), the
    others of the right one (easy); if there are too few of one kind all of
    it, and more of the other. If n is 1 the one is a hard pixel where there
    is any; the published code then takes an easy one always. If there are
    more pairs than ``max_samples`` the first ones get one anchor each; the
    published code then has none.

    Args:
        labels (Tensor): int64, ``(B, h, w)``; ids outside ``[0, C)`` are
            ignored.
        predicted (Tensor): Predicted classes, int64, ``(B, h, w)``.
        scores (Tensor): ``(B * h * w,)``.
        num_classes (int): Number of classes C.
        max_samples (int): Number of slots.
        max_views (int): Anchors of a class in an image, at most.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Indices into ``B * h * w``, int64 ``(max_samples,)``, 0 in
        empty slots, which are the last ones, and labels int64
        ``(max_samples,)``, there ``ignore_index``.
    """
    batch = len(labels)
    pairs = batch * num_classes
    images = torch.arange(batch, device=labels.device).view(-1, 1, 1)
    known = known_labels(labels, num_classes, ignore_index)
    # Two groups for each pair: hard ones and, after them, easy ones.
    groups = 2 * (images * num_classes + labels) + (predicted == labels)
    groups = groups.where(known, groups.new_full((), 2 * pairs)).flatten()
    ranks, sizes = rank_in_groups(groups, scores, 2 * pairs)
    hard, easy = sizes.view(pairs, 2).unbind(1)

    used = hard + easy > max_views
    # At least 1, also against a division by 0.
    views = (max_samples // used.sum().clamp_min(1)).clamp(1, max_views)
    kept = (views // 2).clamp_min(1).minimum(hard).maximum(views - easy)
    place = (used.cumsum(0) - 1) * views
    # For each of both groups: how many are taken, and into which slots.
    number = torch.stack([kept, views - kept], 1) * used.unsqueeze(1)
    first = torch.stack([place, place + kept], 1)

    mine = groups.clamp_max(2 * pairs - 1)
    slots = first.flatten()[mine] + ranks
    taken = (known.flatten() & (ranks < number.flatten()[mine])
             & (slots < max_samples))
    index = _into_slots(slots, taken, max_samples)
    filled = torch.arange(
        max_samples, device=labels.device) < used.sum() * views
    return index, labels.flatten()[index].where(
        filled, labels.new_full((), ignore_index))


def own_probability(logits: Tensor, labels: Tensor,
                    ignore_index: int = IGNORE) -> Tensor:
    """Probability of each pixel's own class.

    Args:
        logits (Tensor): ``(B, C, h, w)``.
        labels (Tensor): int64, ``(B, h, w)``; ids outside ``[0, C)`` are
            ignored.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: ``(B, h, w)``, at least float32; 0 for ignored pixels.
    """
    logits = full_precision(logits)
    known = known_labels(labels, logits.shape[1], ignore_index)
    ids = labels.where(known, labels.new_zeros(())).unsqueeze(1)
    return logits.softmax(1).gather(1, ids).squeeze(1) * known


def pixel_entropy(logits: Tensor) -> Tensor:
    """Entropy of each pixel's class probabilities, in nats.

    Args:
        logits (Tensor): ``(B, C, h, w)``.

    Returns:
        Tensor: ``(B, h, w)``, in ``[0, ln C]``; at least float32.
    """
    logs = full_precision(logits).log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def entropy_threshold(entropy: Tensor, valid: Tensor, percent: float | Tensor
                      ) -> Tensor:
    """Percentile of the entropies of valid pixels, of all ranks together.

    Exact, with linear interpolation as ``numpy.percentile``. With several
    ranks one collective gathers all entropies, 4 bytes a pixel: all ranks
    must enter it with maps of one size, also without a valid pixel.

    Args:
        entropy (Tensor): Finite, of any shape.
        valid (Tensor): bool, of the same shape.
        percent (float | Tensor): In [0, 100]; a tensor is 0-d.

    Returns:
        Tensor: 0-d; infinity without a valid pixel.
    """
    values = entropy.masked_fill(~valid, float('inf')).flatten()
    if get_world_size() > 1:
        values = torch.cat(all_gather(values))
    values = values.sort().values
    last = (values.isfinite().sum() - 1).clamp_min(0)
    place = last.double() * percent / 100
    low = place.floor().long()
    # Not values[low]: a 0-d index is read, which waits for the device.
    below, above = values.gather(0, torch.stack([
        low, (low + 1).minimum(last)])).unbind()
    between = below + (above - below) * (place - low).to(values.dtype)
    # inf - inf is NaN.
    return between.where(below.isfinite(), below)


def unreliable_class_members(probs: Tensor,
                             labels: Tensor,
                             high_entropy: Tensor,
                             labelled: Tensor,
                             low_rank: int = 3,
                             high_rank: int = 20,
                             ignore_index: int = IGNORE) -> Tensor:
    """Of which classes each pixel is a negative key.

    U2PL (Wang et al., CVPR 2022): pixels that are surely not of class c, but
    not easily told from it. On labelled images c is one of the ``low_rank``
    most likely classes and not the label; on others a pixel's entropy is
    high, and c is none of the ``low_rank`` most likely ones but one of the
    ``high_rank``. A pixel may be a key of several classes. The published
    code asks for label c in addition, by which labelled images have no key
    at all and each other pixel at most one.

    Args:
        probs (Tensor): ``(B, C, h, w)``; logits have the same order.
        labels (Tensor): int64, ``(B, h, w)``; read on labelled images, where
            ids outside ``[0, C)`` are ignored.
        high_entropy (Tensor): bool, ``(B, h, w)``; read on the others. False
            for what is not valid, such as padding.
        labelled (Tensor): bool, ``(B,)``: which images are labelled.
        low_rank (int): In ``[1, high_rank]``.
        high_rank (int): Published: 20 for 21 classes.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: bool, ``(B, C, h, w)``.
    """
    classes = probs.shape[1]
    order = probs.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(classes, device=probs.device).view(1, -1, 1, 1)
    ranks = torch.empty_like(order).scatter_(
        1, order, places.expand_as(order))
    known = known_labels(labels, classes, ignore_index)
    confused = ((ranks < low_rank) & (labels.unsqueeze(1) != places)
                & known.unsqueeze(1))
    unsure = ((ranks >= low_rank) & (ranks < high_rank)
              & high_entropy.unsqueeze(1))
    return confused.where(labelled.view(-1, 1, 1, 1), unsure)


def top_scored_members(members: Tensor, scores: Tensor, number: int
                       ) -> tuple[Tensor, Tensor]:
    """:func:`.queue.top_scored` for vectors that may have several classes.

    Args:
        members (Tensor): bool, ``(C, N)``.
        scores (Tensor): Finite, ``(N,)``. A vector has the same score in
            all of its classes.
        number (int): How many of each class, K.

    Returns:
        tuple: Indices int64 ``(C, K)``, highest score first, and bool
        ``(C, K)``: which of them exist.
    """
    classes, size = members.shape
    here = min(number, size)
    index = scores.expand(classes, -1).masked_fill(
        ~members, -float('inf')).topk(here, 1).indices
    exists = members.gather(1, index)
    missing = (0, number - here)
    return (F.pad(index, missing),
            F.pad(exists, missing))


@torch.no_grad()
def push_members(keys: Tensor, pointer: Tensor, filled: Tensor,
                 embeddings: Tensor, members: Tensor, scores: Tensor,
                 number: int) -> None:
    """Append drawn vectors to the queues of all their classes, in place.

    Those of all ranks, in one collective that all must enter, see
    :func:`.queue.gather_new`.

    Args:
        keys (Tensor): ``(C, L, D)``, see :func:`.queue.push`.
        pointer (Tensor): int64, ``(C,)``, see there.
        filled (Tensor): int64, ``(C,)``, see there.
        embeddings (Tensor): ``(N, D)``.
        members (Tensor): bool, ``(C, N)``: of which classes they are keys.
        scores (Tensor): Finite, ``(N,)``; those with the highest are taken,
            and appended in this order.
        number (int): Vectors of each class, at most.
    """
    index, exists = top_scored_members(members, scores, number)
    if not len(embeddings):
        embeddings = embeddings.new_zeros(1, keys.shape[2])
    new, exists = gather_new(embeddings[index].to(keys.dtype), exists)
    push(keys, pointer, filled, new, only_finite(new, exists))
