"""All labels count by the share of confident pixels (DACS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import nn

from ...ops import confident_fraction, hard_labels, without_classes
from .labels import PseudoLabels, without_nan

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class ConfidentFraction(nn.Module):
    """Most likely classes, all weighted by the share of confident pixels.

    DACS (Tranheden et al., 2021): the weight q is the share of pixels whose
    highest probability reaches the threshold, counted over all pixels,
    margins included; pixels outside the view's valid region weigh 0, and so
    do those where the teacher predicts NaN.

    Args:
        num_classes (int): Classes of the student.
        teacher (str): Name in ``model.teachers``.
        view (str): View to label.
        threshold (float): In [0, 1]; 0.968 in both published codes.
        scope (str): 'batch' is one q for the batch on all ranks, 'local' for
            this rank's batch, 'sample' one for each image.
        absent_classes (Sequence[int]): Classes that the labelled data lack,
            taken out before the most likely one is chosen.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 teacher: str = 'ema',
                 view: str = 'target',
                 threshold: float = 0.968,
                 scope: str = 'batch',
                 absent_classes: Sequence[int] = ()) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError('model.pseudo_labels.*.threshold must lie in '
                             f'[0, 1], got {threshold}.')
        if scope not in ('batch', 'local', 'sample'):
            raise ValueError(
                "model.pseudo_labels.*.scope must be 'batch', 'local' or "
                f"'sample', got {scope!r}.")
        wrong = [c for c in absent_classes if not 0 <= c < num_classes]
        if wrong or len(set(absent_classes)) >= num_classes:
            raise ValueError(
                'model.pseudo_labels.*.absent_classes must be some, not all, '
                f'of the ids 0 to {num_classes - 1}, got '
                f'{list(absent_classes)}.')
        self.teacher = teacher
        self.view = view
        self.needs = (view, )
        self.threshold = threshold
        self.scope = scope
        absent = torch.zeros(num_classes, dtype=torch.bool)
        absent[list(absent_classes)] = True
        self.register_buffer('absent', absent, persistent=False)
        self.has_absent = bool(absent_classes)

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> PseudoLabels:
        """Label the view.

        Args:
            step (Step): The iteration.
            name (str): Name of this policy.
        """
        view = step.view(self.view)
        probs = step.teacher(self.teacher, self.view)
        if self.has_absent:
            probs = without_classes(probs, self.absent)
        confidence, labels = hard_labels(probs)
        share = confident_fraction(confidence, self.threshold, self.scope)
        valid = view.valid
        if valid is None:
            valid = torch.ones_like(labels, dtype=torch.bool)
        confidence, labels, valid = without_nan(confidence, labels, valid)
        scale = share.view(-1, 1, 1)
        weights = scale * valid
        step.log(f'{name}.confident_ratio', share.mean())
        step.log(f'{name}.pseudo_weight', weights.mean())
        return PseudoLabels(self.view, labels, confidence, weights,
                            ((share, valid), ))
