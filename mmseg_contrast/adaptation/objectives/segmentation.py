"""Segmentation loss of the student on one view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..heads import Target
from ..losses import IGNORE

if TYPE_CHECKING:
    from ..step import Step
    from ..students import StudentOutput
    from ..view import View


@MODELS.register_module()
class Segmentation(nn.Module):
    """All losses of the student's heads, with the view's labels and weights.

    Args:
        view (str): The view to learn from.
        weight (float): Factor on all losses.
        update_norm (bool, optional): Whether this pass records batch-norm
            statistics. None: if the weight isn't 0.
        accuracy_interval (int): Log ``decode.acc_seg``, as mmseg does in
            each iteration, in every so many; 0 is never. To be logged it
            must be that of the logger.

    Raises:
        ValueError: If the interval is below 0.
    """

    def __init__(self,
                 view: str,
                 weight: float = 1.0,
                 update_norm: bool | None = None,
                 accuracy_interval: int = 0) -> None:
        super().__init__()
        if accuracy_interval < 0:
            raise ValueError('model.objectives.*.accuracy_interval must be '
                             f'>= 0, got {accuracy_interval}.')
        self.accuracy_interval = accuracy_interval
        self.view = view
        self.needs = (view, )
        self.weight = weight
        self.update_norm = weight != 0 if update_norm is None else update_norm

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Losses by mmseg's names (``decode.loss_ce``, ``aux.loss_ce``).

        Args:
            step (Step): The iteration.

        Raises:
            ValueError: If the view has no hard labels.
        """
        view = step.view(self.view)
        if view.labels is None:
            raise ValueError(
                f'an objective learns from the view {self.view!r}, which has '
                'no labels: a Segmentation objective needs a labelled '
                'stream or a view with pseudo-labels.')
        student = step.student(self.view)
        losses = student.losses(Target(
            view.labels, view.weights, view.weight_parts,
            view.extras.get('edges')))
        if 'origin' in view.extras:
            _log_agreement(step, view, student)
        result = {key: self.weight * value for key, value in losses.items()}
        interval = self.accuracy_interval
        if interval and (step.iteration + 1) % interval == 0:
            result.update(_accuracy(view, student))
        return result


@torch.no_grad()
def _accuracy(view: View, student: StudentOutput) -> dict[str, Tensor]:
    """Percent of the labelled pixels that the decode head has right."""
    logits, labels = student.logits, view.labels
    if logits is None or logits.dim() != 4 or labels is None:
        return {}
    logits = F.interpolate(
        logits.float(), labels.shape[-2:], mode='bilinear',
        align_corners=student.align_corners)
    predicted = logits.argmax(1) if logits.shape[1] > 1 else (
        logits[:, 0] > 0).long()
    kept = labels != IGNORE
    right = ((predicted == labels) & kept).sum()
    return {'decode.acc_seg': 100 * right / kept.sum().clamp_min(1)}


@torch.no_grad()
def _log_agreement(step: Step, view: View, student: StudentOutput) -> None:
    """Share of target pixels where student and pseudo-label agree.

    Counted at the logits' own resolution: the full one costs more than it
    tells.
    """
    logits = student.logits
    if logits is None or logits.dim() != 4:
        return
    both = torch.stack([view.labels, view.extras['origin'].long()], 1)
    size = logits.shape[-2:]
    labels, origin = F.interpolate(both.float(), size).long().unbind(1)
    predicted = logits.argmax(1) if logits.shape[1] > 1 else (
        logits[:, 0] > 0).long()
    target = origin == 0
    agreed = ((predicted == labels) & target).sum()
    step.log(f'{view.name}.agreement', agreed / target.sum().clamp_min(1))
