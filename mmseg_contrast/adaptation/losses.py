"""Losses with pixel weights, for any loss of mmseg.

mmseg's heads take no weight map. Losses that average pixel terms accept one
(cross entropy); others ignore it silently (Lovasz) or refuse it (OHEM, Dice).
Which is which is found out by trying, once, when the model is built.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.losses import CrossEntropyLoss, cross_entropy
from torch import Tensor, nn

IGNORE = 255
WeightParts = Sequence[tuple[Tensor, Tensor]]


@functools.cache
def _knows_ignore_index(forward: Any) -> bool:
    names = inspect.signature(forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return takes_any or 'ignore_index' in names


def _keywords(loss: nn.Module, ignore_index: int) -> dict[str, int]:
    """Pass ``ignore_index`` only to losses that know it."""
    if _knows_ignore_index(type(loss).forward):
        return dict(ignore_index=ignore_index)
    return {}


def _average_factor(loss: nn.Module, labels: Tensor, ignore_index: int
                    ) -> dict[str, Tensor]:
    """What mmseg's cross entropy divides by, where it would wait for it.

    Counting pixels that are not ignored it asks the GPU for the number; with
    class weights the forks select these pixels, and stock 1.2.2 stops at the
    first ignored one, of whose "class" there is no weight.
    """
    if (not isinstance(loss, CrossEntropyLoss) or loss.reduction != 'mean'
            or loss.cls_criterion is not cross_entropy):
        return {}
    valid = labels != ignore_index
    if loss.class_weight is not None:
        weights = torch.tensor(loss.class_weight, device=labels.device)
        each = weights[labels.where(valid, labels.new_zeros(()))]
        return dict(avg_factor=(each * valid).sum())
    return dict(avg_factor=valid.sum()) if loss.avg_non_ignore else {}


def _where_tried(loss: nn.Module) -> list[torch.device]:
    """Where a loss has its tensors; some stock ones work on a GPU alone."""
    own = next((one.device for one in (*loss.parameters(), *loss.buffers())),
               torch.device('cpu'))
    return [own, *([torch.device('cuda')] if torch.cuda.is_available()
                   and own.type != 'cuda' else [])]


def takes_pixel_weights(loss: nn.Module, channels: int,
                        ignore_index: int = IGNORE) -> bool:
    """Whether the loss is linear in a weight map ``(N, H, W)``.

    Args:
        loss (nn.Module): A loss of mmseg's kind.
        channels (int): Channels of the logits it gets.
        ignore_index (int): Label that is ignored.
    """
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, channels, 4, 4, generator=gen)
    labels = torch.randint(0, max(channels, 2), (2, 4, 4), generator=gen)
    weights = torch.rand(2, 4, 4, generator=gen)
    keywords = _keywords(loss, ignore_index)

    def value(weight: Tensor, device: torch.device) -> Tensor:
        return loss(logits.to(device), labels.to(device),
                    weight=weight.to(device), **keywords)

    for device in _where_tried(loss):
        try:
            one, two, zero, flat = (value(weight, device) for weight in (
                weights, 2 * weights, 0 * weights, torch.ones_like(weights)))
        except Exception:
            # Any failure means the same: it can't be given a weight map here.
            continue
        return bool(one.dim() == 0 and zero == 0 and torch.isfinite(one)
                    and torch.isclose(two, 2 * one) and flat != one)
    return False


def check_loss(loss: nn.Module, channels: int, where: str,
               ignore_index: int = IGNORE) -> bool:
    """Find out how a loss can be weighted; refuse one that can't.

    Args:
        loss (nn.Module): A loss of mmseg's kind.
        channels (int): Channels of the logits it gets.
        where (str): Config key for the message.
        ignore_index (int): Label that is ignored.

    Returns:
        bool: True if it takes a weight map; False if the weights must be
            folded into its labels.

    Raises:
        ValueError: If the loss works neither way.
    """
    if takes_pixel_weights(loss, channels, ignore_index):
        return True
    errors = []
    for device in _where_tried(loss):
        logits = torch.zeros(2, channels, 4, 4, device=device)
        labels = torch.zeros(2, 4, 4, dtype=torch.long, device=device)
        try:
            # Some pixels ignored, then one image of two, then all.
            for ignored in (labels[:, :2], labels[0], labels):
                ignored.fill_(ignore_index)
                loss(logits, labels, **_keywords(loss, ignore_index))
            return False
        except Exception as error:
            errors.append(error)
    raise ValueError(
        f'{where} = {type(loss).__name__} can be given neither pixel weights '
        f'nor images without labels ({errors[0]}); use a loss that can, such '
        'as CrossEntropyLoss.')


def _guarded(loss: nn.Module, logits: Tensor, labels: Tensor,
             ignore_index: int) -> Tensor:
    """The loss, 0 (and still of the graph) where no pixel has a label.

    Without a labelled pixel, stock losses are NaN, an empty tensor, or a
    constant that knows no parameter.
    """
    value = loss(logits, labels, **_keywords(loss, ignore_index))
    nothing = logits.sum() * 0
    if value.numel() == 0:
        return nothing
    any_left = (labels != ignore_index).any()
    return nothing + torch.where(any_left, value.mean(), nothing)


def weighted_loss(loss: nn.Module,
                  logits: Tensor,
                  labels: Tensor,
                  weights: Tensor | None = None,
                  parts: WeightParts | None = None,
                  takes_map: bool = True,
                  ignore_index: int = IGNORE) -> Tensor:
    """One loss of one head, with a weight for every pixel.

    Args:
        loss (nn.Module): A loss of mmseg's kind.
        logits (Tensor): ``(N, C, H, W)``, at the labels' resolution.
        labels (Tensor): int64, ``(N, H, W)``.
        weights (Tensor, optional): ``(N, H, W)``; None is 1 everywhere.
        parts (WeightParts, optional): The same weights as
            ``sum scale * mask``; needed where ``takes_map`` is False.
        takes_map (bool): See :func:`check_loss`. Where False, the loss is
            ``sum_k scale_k * loss(labels where mask_k, ignored elsewhere)``,
            which equals the weighted one for every mean over all pixels.
        ignore_index (int): Label that is ignored.

    Returns:
        Tensor: 0-d.

    Raises:
        ValueError: If weights are given that the loss can't express.
    """
    if not takes_map and weights is None:
        return _guarded(loss, logits, labels, ignore_index)
    if takes_map:
        return loss(logits, labels, weight=weights,
                    **_average_factor(loss, labels, ignore_index),
                    **_keywords(loss, ignore_index))
    if parts is None:
        raise ValueError(
            f'{type(loss).__name__} takes no weight map, and the weights of '
            'this view are no sum of a few masks; use CrossEntropyLoss in '
            'model.segmentor.decode_head.loss_decode.')
    total = logits.sum() * 0
    for scale, mask in parts:
        kept = torch.where(mask, labels, ignore_index)
        total = total + scale * _guarded(loss, logits, kept, ignore_index)
    return total
