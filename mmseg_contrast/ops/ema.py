"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def annealed_alpha(step: int, alpha: float) -> float:
    """Teacher momentum at ``step``: ``min(1 - 1 / (step + 1), alpha)``.

    Mean Teacher (Tarvainen and Valpola, 2017) as used by DACS and DAFormer:
    the average starts as a plain mean of the students seen so far.

    Args:
        step (int): Updates made before this one; 0 gives 0 (a copy).
        alpha (float): Final momentum, in [0, 1].
    """
    return min(1 - 1 / (step + 1), alpha)


@torch.no_grad()
def ema_update(teacher: Sequence[Tensor], student: Sequence[Tensor],
               alpha: float) -> None:
    """``teacher = alpha * teacher + (1 - alpha) * student``, in place.

    Two fused passes over all tensors; equal, bit for bit, to the loop over
    them.

    Args:
        teacher (Sequence[Tensor]): Tensors to update.
        student (Sequence[Tensor]): Tensors of the same shapes.
        alpha (float): Momentum in [0, 1].
    """
    if not teacher:
        return
    if alpha == 0:
        torch._foreach_copy_(list(teacher), list(student))
        return
    torch._foreach_mul_(list(teacher), alpha)
    torch._foreach_add_(list(teacher), list(student), alpha=1 - alpha)
