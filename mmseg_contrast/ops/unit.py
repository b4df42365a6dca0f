"""Vectors of length 1."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision

#: What is shorter has no direction, as in ``F.normalize``.
SHORTEST = 1e-12


def unit(vectors: Tensor, dim: int = 1) -> Tensor:
    """Scale to length 1; a vector of zeros stays as it is.

    ``F.normalize``, but for the gradient at zero: that one multiplies by
    1e12 there, and a pixel of which a ReLU has left nothing would blow up
    all weights. Here it passes.

    Args:
        vectors (Tensor): Any shape.
        dim (int): Along which a vector lies.

    Returns:
        Tensor: The same shape, float32 or wider: squares of half precision
        would underflow.
    """
    wide = full_precision(vectors)
    length = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return wide / length.masked_fill(length < SHORTEST, 1.)
