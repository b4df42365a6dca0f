"""Mean and variance of the feature vectors of each class, as they come in.

Moments are a tuple ``(count, mean, m2)``: int64 ``(C,)``, float ``(C, D)``
and the sum of squared deviations from the mean, float ``(C, D)``.
"""

from __future__ import annotations

import torch
from mmengine.dist import all_gather, get_world_size
from torch import Tensor

from .labels import IGNORE, ignored_last
from .precision import full_precision

Moments = tuple[Tensor, Tensor, Tensor]

#: Elements that a CPU works on at a time, so that they stay in its cache.
PIECE_ELEMENTS = 2**20


@torch.no_grad()
def class_moments(features: Tensor,
                  labels: Tensor,
                  num_classes: int,
                  ignore_index: int = IGNORE) -> Moments:
    """Moments of one batch; those of an absent class are 0.

    Two passes over the batch, and memory of its size, not C times it; on the
    CPU of a piece of it. No host sync, no gradient.

    Args:
        features (Tensor): ``(N, D)``.
        labels (Tensor): Class ids, int64, ``(N,)``; ids outside
            ``[0, num_classes)`` are ignored.
        num_classes (int): Number of classes C.
        ignore_index (int): Label that is ignored.

    Returns:
        Moments: count, mean and m2; at least float32.
    """
    features = full_precision(features)
    # Ignored rows are a class of their own, which is cut off at the end.
    ids = ignored_last(labels, num_classes, ignore_index)
    count = ids.new_zeros(num_classes + 1)
    count.index_add_(0, ids, torch.ones_like(ids))
    rows, width = len(features), features.shape[1]
    if features.device.type == 'cpu':
        rows = PIECE_ELEMENTS // max(1, width)
    pieces = list(zip(
        features.split(max(1, rows)), ids.split(max(1, rows)), strict=True))
    mean = features.new_zeros(num_classes + 1, width)
    for piece, mine in pieces:
        mean.index_add_(0, mine, piece)
    mean /= count.clamp_min(1).unsqueeze(1)
    m2 = torch.zeros_like(mean)
    space = torch.empty_like(pieces[0][0])
    for piece, mine in pieces:
        apart = torch.index_select(mean, 0, mine, out=space[:len(mine)])
        m2.index_add_(0, mine, apart.sub_(piece).square_())
    return count[:-1], mean[:-1], m2[:-1]


def merge_moments(first: Moments, second: Moments) -> Moments:
    r"""Moments of two sets of vectors together, exactly.

    .. math::
        \mu = \mu_a + \frac{n_b}{n} (\mu_b - \mu_a), \quad
        M = M_a + M_b + \frac{n_a n_b}{n} (\mu_b - \mu_a)^2

    Chan, Golub and LeVeque, 1983. A class that is absent from one set keeps
    the values of the other.

    Args:
        first (Moments): a, for instance all that has been seen.
        second (Moments): b, for instance one batch.

    Returns:
        Moments: count, mean and m2, in the dtype of the first.
    """
    dtype = first[1].dtype
    count = first[0] + second[0]
    share = (second[0].to(dtype) / count.clamp_min(1).to(dtype)).unsqueeze(1)
    change = second[1].to(dtype) - first[1]
    mean = first[1] + share * change
    both = first[0].to(dtype).unsqueeze(1) * share
    return count, mean, first[2] + second[2].to(dtype) + both * change**2


def class_variance(moments: Moments) -> Tensor:
    """Biased variance of each class, ``(C, D)``; 0 for an absent one."""
    count, _, m2 = moments
    return m2 / count.clamp_min(1).to(m2.dtype).unsqueeze(1)


def pool_moments(count: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Moments of several sets of vectors together, exactly.

    Args:
        count (Tensor): ``(R, C)``, of R sets.
        mean (Tensor): ``(R, C, D)``.
        m2 (Tensor): ``(R, C, D)``.

    Returns:
        Moments: Of all of them; 0 for a class that no set has.
    """
    number = count.to(mean.dtype).unsqueeze(2)
    centre = (number * mean).sum(0) / number.sum(0).clamp_min(1)
    apart = (number * (mean - centre).square()).sum(0)
    return count.sum(0), centre, m2.sum(0) + apart


def gather_moments(moments: Moments) -> Moments:
    """Moments of the batches of all ranks together: the same on each.

    One collective, which all ranks must enter, also without a vector.

    Args:
        moments (Moments): Of this rank's batch.

    Returns:
        Moments: In the dtypes of the arguments.
    """
    if get_world_size() == 1:
        return moments
    count, mean, m2 = moments
    # float64 holds counts exactly up to 2^53.
    packed = torch.cat([count.unsqueeze(1), mean, m2.double()], 1)
    number, centre, spread = torch.stack(all_gather(packed)).split(
        [1, mean.shape[1], mean.shape[1]], 2)
    pooled = pool_moments(number.squeeze(2), centre, spread)
    return (pooled[0].to(count.dtype), pooled[1].to(mean.dtype),
            pooled[2].to(m2.dtype))
