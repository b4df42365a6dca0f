"""Prototypes of the target's classes, and distances from them (ProDA).

Zhang et al., Prototypical Pseudo Label Denoising, CVPR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import IGNORE, ignored_last
from .precision import full_precision


def image_class_means(features: Tensor,
                      labels: Tensor,
                      num_classes: int,
                      min_pixels: int = 1,
                      ignore_index: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Mean feature vector of each class in each image.

    Args:
        features (Tensor): ``(N, D, h, w)``.
        labels (Tensor): Class ids, int64, ``(N, h, w)``; ids outside
            ``[0, num_classes)`` are ignored.
        num_classes (int): Number of classes C.
        min_pixels (int): A class with fewer has no mean in this image.
        ignore_index (int): Label that is ignored.

    Returns:
        tuple: Means ``(C, N, D)``, at least float32, 0 where there is none,
        and bool ``(C, N)``: which exist. One that is not finite does not.
    """
    samples, channels = features.shape[:2]
    features = full_precision(features)
    ids = ignored_last(labels, num_classes, ignore_index).flatten(1)
    image = torch.arange(samples, device=labels.device).unsqueeze(1)
    ids = (ids * samples + image).flatten()
    rows = (num_classes + 1) * samples
    count = ids.new_zeros(rows).index_add_(0, ids, torch.ones_like(ids))
    total = features.new_zeros(rows, channels).index_add(
        0, ids, features.flatten(2).transpose(1, 2).flatten(0, 1))
    means = total / count.clamp_min(1).unsqueeze(1)
    exists = (count >= max(min_pixels, 1)) & means.isfinite().all(1)
    # Not times exists: NaN times 0 is NaN.
    means = means.where(exists.unsqueeze(1), means.new_zeros(()))
    kept = num_classes * samples
    return (means[:kept].view(num_classes, samples, channels),
            exists[:kept].view(num_classes, samples))


def moved_prototypes(prototypes: Tensor, count: Tensor, new: Tensor,
                     exists: Tensor, momentum: float, mean_until: int
                     ) -> tuple[Tensor, Tensor]:
    """Prototypes after one vector has come in after the other.

    A class's first ``mean_until`` vectors are averaged; each later one has
    the weight ``momentum``: ``p = (1 - momentum) p + momentum v``. The first
    of all is taken as it is. No loop: vector j ends with the weight
    ``a_j (1 - a_{j+1}) (1 - a_{j+2}) ...``, where ``a`` are these shares.

    Args:
        prototypes (Tensor): ``(C, D)``.
        count (Tensor): Vectors that each class has had, int64, ``(C,)``.
        new (Tensor): ``(C, K, D)``, oldest first, finite.
        exists (Tensor): bool, ``(C, K)``: which of them are vectors.
        momentum (float): In (0, 1].
        mean_until (int): >= 0.

    Returns:
        tuple: Prototypes ``(C, D)`` and counts; those of a class without a
        vector are as they were.
    """
    before = count.unsqueeze(1) + exists.cumsum(1) - exists.long()
    share = torch.where(
        before < max(mean_until, 1),
        1 / (before + 1).to(prototypes.dtype), momentum) * exists
    # What remains of vector j after all later ones, and of what was before.
    left = (1 - share).flip(1).cumprod(1).flip(1)
    later = torch.cat([left[:, 1:], torch.ones_like(left[:, :1])], 1)
    gained = torch.einsum('ck,ckd->cd', share * later,
                          new.to(prototypes.dtype))
    moved = prototypes * left[:, :1] + gained
    return moved, count + exists.sum(1)


def prototype_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Euclidean distance of each pixel's feature vector from each prototype.

    Args:
        features (Tensor): ``(N, D, h, w)``.
        prototypes (Tensor): ``(C, D)``.

    Returns:
        Tensor: ``(N, C, h, w)``, at least float32. Differences are taken
        before squaring, so that near ones are exact, and never kept.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    samples, _, height, width = features.shape
    pixels = features.to(dtype).flatten(2).transpose(1, 2).flatten(0, 1)
    with torch.autocast(features.device.type, enabled=False):
        distances = torch.cdist(
            pixels, prototypes.to(dtype),
            compute_mode='donot_use_mm_for_euclid_dist')
    return distances.view(samples, height, width, -1).permute(0, 3, 1, 2)


def prototype_scores(features: Tensor, prototypes: Tensor, exists: Tensor,
                     temperature: float) -> Tensor:
    r"""Logarithm of how near each pixel is to each prototype.

    .. math::
        \log \mathrm{softmax}_c (-T \lVert f - \eta_c \rVert)

    Args:
        features (Tensor): ``(N, D, h, w)``.
        prototypes (Tensor): ``(C, D)``.
        exists (Tensor): bool, ``(C,)``; others get minus infinity, or all
            the same if there is none at all.
        temperature (float): T, > 0; it multiplies the distance.

    Returns:
        Tensor: ``(N, C, h, w)``.
    """
    energies = -temperature * prototype_distances(features, prototypes)
    exists = (exists | ~exists.any()).view(1, -1, 1, 1)
    return energies.masked_fill(~exists, -float('inf')).log_softmax(1)


def prototype_consistency(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Divergence of the student's nearness to prototypes from the teacher's.

    .. math::
        \frac{1}{N C h w} \sum e^t (t - s)

    Args:
        student (Tensor): s, logarithms ``(N, C, h, w)``, see
            :func:`prototype_scores`.
        teacher (Tensor): t, likewise, of the same shape.

    Returns:
        Tensor: 0-d; a class without a prototype adds 0.
    """
    known = ~torch.isinf(teacher)
    zero = teacher.new_zeros(())
    # Both are masked before they meet: infinity times 0 has no gradient.
    apart = teacher.where(known, zero) - student.where(known, zero)
    return (teacher.exp() * apart).mean()
