"""Where the numbers of an iteration stop being finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..adaptation.step import Step

LOSS, IMAGES, TEACHER, FEATURES, LOGITS = (
    'loss', 'images', 'teacher', 'features', 'logits')
#: Kind and name of something that is watched.
Place = tuple[str, str]


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


class Trace:
    """A few numbers of one iteration, which are finite if all is.

    Each stands for a tensor: a loss for itself, others are sums, in which
    one NaN or infinity shows. They stay on the device.
    """

    def __init__(self) -> None:
        self._fatal: dict[Place, Tensor] = {}
        self._clues: dict[Place, Tensor] = {}

    @property
    def places(self) -> list[Place]:
        """What the numbers are of, in their order."""
        return [*self._fatal, *self._clues]

    def add_losses(self, log_vars: Mapping[str, Tensor]) -> None:
        """Watch losses; the total comes last, its parts say more.

        Args:
            log_vars (Mapping): What ``parse_losses`` gives for the log; keys
                without 'loss' are not minimised and not watched.
        """
        keys = [key for key in log_vars if 'loss' in key and key != 'loss']
        if 'loss' in log_vars:
            keys.append('loss')
        for key in keys:
            value = log_vars[key]
            # Losses may come in parts, each with a total.
            self._fatal.pop((LOSS, key), None)
            if isinstance(value, Tensor):  # 0 where there was no loss
                self._fatal[LOSS, key] = value.detach().float().view(())

    def add_step(self, step: Step) -> None:
        """Watch views, teachers and the student's passes of a step.

        Images that are not finite are as bad as such a loss: where they are
        ignored, the loss may hide them, their gradients are NaN anyway.

        Args:
            step (Step): After its losses; nothing new is computed.
        """
        for name, seen_as in step.views.items():
            self._fatal[IMAGES, name] = _sum(seen_as.images)
        for (teacher, view), probs in step.predictions.items():
            self._clues[TEACHER, f'{teacher!r} on {view!r}'] = _sum(probs)
        for view, seen in step.students.items():
            self._clues[FEATURES, view] = _sum(seen.features[-1])
            logits = seen.logits_if_seen
            if logits is not None:
                self._clues[LOGITS, view] = _sum(logits)

    def numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All of them, and whether one is bad.

        Args:
            device (torch.device): For an iteration without any.

        Returns:
            tuple: float32 ``(n,)``, in the order of :attr:`places`, and
            float32 ``(1,)``: 1 if a loss or an image is not finite.
        """
        values = [*self._fatal.values(), *self._clues.values()]
        if not values:
            return torch.zeros(0, device=device), torch.zeros(1, device=device)
        every = torch.stack(values)
        finite = every[:len(self._fatal)].isfinite().all()
        return every, (~finite).float().view(1)


def _sum(tensor: Tensor) -> Tensor:
    # Half precision would overflow in the sum.
    return tensor.detach().sum(dtype=torch.float32)


def not_finite(places: Sequence[Place], numbers: Sequence[float]
               ) -> dict[Place, float]:
    """Those that are NaN or infinite, in their order.

    Args:
        places (Sequence[Place]): What the numbers are of.
        numbers (Sequence[float]): On the host.
    """
    return {place: number
            for place, number in zip(places, numbers, strict=True)
            if not math.isfinite(number)}


@torch.no_grad()
def gradients_flag(optimizer: torch.optim.Optimizer, device: torch.device
                   ) -> Tensor:
    """Whether a gradient is not finite, float32 ``(1,)``; no host sync.

    Args:
        optimizer (torch.optim.Optimizer): Whose parameters are looked at.
        device (torch.device): Where the result is.
    """
    grads = [one.grad for group in optimizer.param_groups
             for one in group['params'] if one.grad is not None]
    if not grads:
        return torch.zeros(1, device=device)
    norms = torch.stack([one.float() for one in torch._foreach_norm(grads)])
    return (~norms.isfinite().all()).float().view(1).to(device)


@torch.no_grad()
def broken_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient is not finite; waits.

    Args:
        model (nn.Module): The model, not wrapped.
    """
    return [name for name, one in model.named_parameters()
            if one.grad is not None and not one.grad.isfinite().all()]


@torch.no_grad()
def broken_weights(model: nn.Module, buffers: bool = True) -> list[str]:
    """Names of parameters that are not finite and of NaN buffers; waits.

    An infinite buffer may be a mask.

    Args:
        model (nn.Module): The model, not wrapped.
        buffers (bool): Whether buffers are looked at. A pass over images
            that are not finite spoils statistics of norms.
    """
    names, sums = [], []
    for name, one in model.named_parameters():
        names.append(name)
        sums.append(_sum(one))
    for name, one in model.named_buffers():
        if buffers and one.is_floating_point():
            names.append(name)
            total = _sum(one)
            sums.append(total.where(total.isnan(), total.new_zeros(())))
    if not sums:
        return []
    fine = torch.stack(sums).isfinite().tolist()
    return [name for name, good in zip(names, fine, strict=True) if not good]


def views_of(model: Any, key: str) -> tuple[str, ...]:
    """Views that a loss is computed from.

    Args:
        model (Any): The model, not wrapped; only UDASegmentor has views.
        key (str): Its log key, ``<objective>.<key>``.
    """
    objectives = getattr(model, 'objectives', {})
    name = key.partition('.')[0]
    return tuple(objectives[name].needs) if name in objectives else ()


def first_cause(found: Mapping[Place, float], weights: Sequence[str],
                raw: Mapping[str, Sequence[str]], traced: bool) -> str:
    """Where it began, as a sentence.

    Args:
        found (Mapping): See :func:`not_finite`.
        weights (Sequence[str]): See :func:`broken_weights`.
        raw (Mapping): By stream, files whose images are not finite as they
            were loaded.
        traced (bool): Whether views and predictions were watched.
    """
    if weights:
        return (f'Weights are not finite already: {_few(weights)}.')
    if raw:
        name, files = next(iter(raw.items()))
        return (f'Images{_of(name)} are not finite as loaded: '
                f'{_few(files)}.')
    for kind, text in (
            (IMAGES, 'Images of the view {0!r} are not finite.'),
            (TEACHER, 'Probabilities of the teacher {0} are not finite.'),
            (FEATURES, "The student's features of the view {0!r} are not "
                       'finite, though its images and all weights are.'),
            (LOGITS, "The student's logits of the view {0!r} are not "
                     'finite, though its features are.')):
        names = [name for one, name in found if one == kind]
        if names:
            return text.format(names[0])
    if traced:
        return ('Images, predictions and weights are finite: it comes from '
                'the loss itself, its labels, weights or bank, or from its '
                'backward.')
    return ('Images and weights are finite: it comes from the net or from '
            'the loss.')


def _of(stream: str) -> str:
    return f' of the stream {stream!r}' if stream else ''


def _few(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ', '.join(names[:3]) + (f' and {more} more' if more > 0 else '')
