"""Numbers wide enough to be summed and compared."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(values: Tensor) -> Tensor:
    """The same values, float32 at least.

    Args:
        values (Tensor): Floating, any shape.

    Returns:
        Tensor: float32, or float64 where that is what came.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
