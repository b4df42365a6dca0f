"""A loss that is computed some anchors at a time, with its gradients.

The loss is one number, so its gradients are computed in the forward and only
scaled in the backward: nothing but them is kept. A second derivative does not
exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contrast import temperature_scale

#: Anchors ``(N, D)`` over tau, keys ``(M, D)``, the weights of both, and the
#: extra energies.
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

#: ``walk(inputs, needs)`` gives the sum of the terms of all anchors, the
#: number of anchors and the gradients of the sum with respect to each input
#: that needs one.
Walk = Callable[[Inputs, list[bool]],
                tuple[Tensor, Tensor, list[Tensor | None]]]


def leaves_of(*tensors: Tensor | None) -> list[Tensor | None]:
    """Starts of a graph of their own, where gradients are recorded."""
    return [None if one is None else one.detach().requires_grad_(
        torch.is_grad_enabled()) for one in tensors]


def gradients_of(total: Tensor, leaves: list[Tensor | None]
                 ) -> list[Tensor | None]:
    """Gradients of a sum with respect to :func:`leaves_of` something."""
    grads = iter(torch.autograd.grad(
        total, [one for one in leaves if one is not None],
        allow_unused=True))
    return [None if one is None else next(grads) for one in leaves]


#: How many times as large chunks are on a GPU: launching their operations
#: takes longer than small ones do, and no cache holds them anyway.
GPU_TIMES = 4


def anchors_at_once(chunk_size: int | None, elements: int, columns: int,
                    device: torch.device | None = None) -> int:
    """Anchors of a chunk.

    Args:
        chunk_size (int, optional): What the caller wants, at least 1. None:
            as many as ``elements`` numbers are for.
        elements (int): Numbers that may exist at a time.
        columns (int): Numbers that there are for each anchor.
        device (torch.device, optional): Where; on a GPU ``elements`` is times
            4.

    Raises:
        ValueError: If ``chunk_size`` is below 1.
    """
    if chunk_size is None:
        if device is not None and device.type == 'cuda':
            elements *= GPU_TIMES
        return max(1, elements // max(1, columns))
    if chunk_size < 1:
        raise ValueError(f'chunk_size = {chunk_size} must be at least 1')
    return chunk_size


def chunked_loss(walk: Walk, anchors: Tensor, keys: Tensor, tau: float,
                 base_tau: float | None, anchor_weights: Tensor | None,
                 key_weights: Tensor | None, extra: Tensor | None) -> Tensor:
    """Mean of the terms of all anchors, in full precision.

    Args:
        walk (Walk): See there.
        anchors (Tensor): ``(N, D)``.
        keys (Tensor): ``(M, D)``.
        tau (float): Temperature, > 0.
        base_tau (float, optional): The loss is times ``tau / base_tau``.
        anchor_weights (Tensor, optional): Whatever ``walk`` makes of them.
        key_weights (Tensor, optional): As these.
        extra (Tensor, optional): ``(N,)``.

    Returns:
        Tensor: 0-d; without an anchor or key 0, of the graph.

    Raises:
        ValueError: If a temperature is not above 0.
    """
    scale = temperature_scale(tau, base_tau)
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, keys = anchors.to(dtype), keys.to(dtype)
        if not len(anchors) or not len(keys):
            # Zero, and connected to whatever asks for gradients.
            if extra is not None:  # infinite for no energy
                extra = extra.nan_to_num(0., 0., 0.)
            return sum((one.sum() * 0 for one in (
                keys, anchor_weights, key_weights, extra)
                if one is not None and one.requires_grad), anchors.sum() * 0)
        loss = _ChunkedLoss.apply(
            anchors / tau, keys,
            None if anchor_weights is None else anchor_weights.to(dtype),
            None if key_weights is None else key_weights.to(dtype),
            None if extra is None else extra.to(dtype),
            walk, torch.is_grad_enabled())
        return loss * scale


class _ChunkedLoss(torch.autograd.Function):
    """Mean of the terms over all anchors, with the gradients."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, keys: Tensor,
                anchor_weights: Tensor | None, key_weights: Tensor | None,
                extra: Tensor | None, walk: Walk, recording: bool) -> Tensor:
        """Loss; gradients of what needs them are kept for the backward."""
        needs = [recording and need for need in ctx.needs_input_grad[:5]]
        total, number, grads = walk(
            (anchors, keys, anchor_weights, key_weights, extra), needs)
        number = number.clamp_min(1)
        ctx.save_for_backward(
            *(None if one is None else one.div_(number) for one in grads))
        return total / number

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times what arrives."""
        if torch.is_grad_enabled():  # create_graph=True
            # They would be constants, and a second derivative silently 0.
            raise RuntimeError(
                'the contrast of many keys has no second derivative; use '
                'contrast_loss of its energies and positives for one')
        return (*(None if one is None else one * scale
                  for one in ctx.saved_tensors), None, None)
