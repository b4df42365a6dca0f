"""Pixels that are sure of their class count, others don't."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import nn

from ...ops import hard_labels
from .labels import (
    Predictor,
    PseudoLabels,
    check_choice,
    check_unit,
    counted_where,
    known_teacher,
)

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class ConfidentPixels(nn.Module):
    """Most likely classes; those below the threshold weigh 0.

    SDCA (Li et al., AAAI 2022) labels the target so, online and with the
    student's own prediction (``teacher='student'``), at 0.9. ProCA's
    published code has the same number for the highest logit instead
    (``on='logit'``), a far weaker filter.

    Args:
        teacher (str): Name in ``model.teachers``, or 'student' for the
            student's own current pass, without its gradients.
        view (str): View to label.
        threshold (float): A pixel that reaches it counts; in [0, 1] with
            ``on='probability'``.
        on (str): 'probability' or 'logit'; what is compared.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 teacher: str = 'ema',
                 view: str = 'target',
                 threshold: float = 0.9,
                 on: str = 'probability') -> None:
        super().__init__()
        check_choice('on', on, 'probability', 'logit')
        if on == 'probability':
            check_unit('threshold', threshold)
        self.teacher = known_teacher(teacher)
        self.view = view
        self.needs = (view, )
        self.threshold = threshold
        self.on = on
        self.predictor = Predictor(teacher, view)

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> PseudoLabels:
        """Label the view.

        Args:
            step (Step): The iteration.
            name (str): Name of this policy.

        Raises:
            ValueError: If there are no logits of two classes or more.
        """
        if self.on == 'probability':
            confidence, labels = hard_labels(
                self.predictor.probabilities(step))
            sure = confidence >= self.threshold
        else:
            logits = self.predictor.logits(step)
            if logits.shape[1] == 1:
                raise ValueError(
                    f"model.pseudo_labels.{name}.on = 'logit' needs a logit "
                    "for each class, but the decode head has one channel: "
                    "use on='probability'.")
            highest, labels = hard_labels(logits)
            # Its probability: 1 / sum of exp(others - highest).
            confidence = (highest - logits.logsumexp(1)).exp()
            sure = highest >= self.threshold
        return counted_where(
            step, name, step.view(self.view), labels, confidence, sure)
