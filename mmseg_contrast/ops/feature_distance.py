"""How far features are from those of a reference network."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_feature_distance(features: Tensor, reference: Tensor,
                            mask: Tensor) -> Tensor:
    r"""Mean Euclidean distance of the feature vectors inside a mask.

    .. math:: \frac{1}{|M|} \sum_{p \in M} \lVert f_p - g_p \rVert_2

    The thing-class feature distance of DAFormer (Hoyer et al., CVPR 2022),
    except for an empty mask: that is 0 here, of the graph, with zero
    gradients (NaN there). Two equal vectors have gradient zero. At least
    float32 inside; no host sync.

    Args:
        features (Tensor): f, ``(N, C, h, w)``.
        reference (Tensor): g, same shape.
        mask (Tensor): M, bool, ``(N, h, w)``.

    Returns:
        Tensor: 0-d, float32 or wider.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    difference = features.to(dtype) - reference.to(dtype)
    # vector_norm defines the gradient at zero as zero; sqrt's is infinite.
    distance = torch.linalg.vector_norm(difference, dim=1)
    inside = torch.where(mask, distance, 0.)
    return inside.sum() / mask.sum().clamp_min(1)
