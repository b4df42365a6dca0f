"""What a policy gives, and what policies have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops import logit_probabilities
from ...ops.labels import IGNORE
from ..view import View

if TYPE_CHECKING:
    from ..step import Step

STUDENT = 'student'


@dataclass
class PseudoLabels:
    """Labels of a view that are not ground truth.

    Args:
        view (str): Name of the view.
        labels (Tensor): int64, ``(N, H, W)``; 255 where there is none, as
            where a prediction is NaN.
        confidence (Tensor): Probability of the label, float32, ``(N, H, W)``;
            finite.
        weights (Tensor): Loss weight, float32, ``(N, H, W)``.
        parts (tuple): The same weights as ``(scale, mask)`` pairs.
        probs (Tensor, optional): Soft labels, float, ``(N, C, H, W)``.
    """

    view: str
    labels: Tensor
    confidence: Tensor
    weights: Tensor
    parts: tuple[tuple[Tensor, Tensor], ...]
    probs: Tensor | None = None


class Predictor:
    """Whose predictions a policy reads: a teacher's or the student's own.

    The student's are those of the pass that it learns from, in training mode
    and without their gradients: they cost no further pass.

    Args:
        teacher (str): Name in ``model.teachers``, or 'student'.
        view (str): The view.
    """

    def __init__(self, teacher: str, view: str) -> None:
        self.teacher = teacher
        self.view = view

    def probabilities(self, step: Step) -> Tensor:
        """Class probabilities, ``(N, C, H, W)``, without gradients.

        Args:
            step (Step): The iteration.
        """
        if self.teacher != STUDENT:
            return step.teacher(self.teacher, self.view)
        return logit_probabilities(self.logits(step))

    def logits(self, step: Step) -> Tensor:
        """Logits at the images' resolution, without gradients.

        Args:
            step (Step): The iteration.

        Returns:
            Tensor: float32 or wider, ``(N, C, H, W)``.

        Raises:
            ValueError: If the decode head has no map of logits.
        """
        # The pass is kept: who asks for it later wants its gradients.
        with torch.enable_grad():
            seen = (step.student(self.view) if self.teacher == STUDENT else
                    step.teacher_pass(self.teacher, self.view))
            logits = seen.image_logits
        if logits is None:
            raise ValueError(
                'model.segmentor.decode_head gives no map of logits, which a '
                'policy in model.pseudo_labels asks for: let it read the '
                'probabilities of a teacher.')
        return logits.detach()


def known_teacher(teacher: str) -> str | None:
    """The name to be looked up in ``model.teachers``; None for the student.

    Args:
        teacher (str): What the config says.
    """
    return None if teacher == STUDENT else teacher


def without_nan(confidence: Tensor, labels: Tensor, counts: Tensor
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Where a prediction is no number there is no label.

    Args:
        confidence (Tensor): ``(N, H, W)``.
        labels (Tensor): int64, ``(N, H, W)``.
        counts (Tensor): bool, ``(N, H, W)``: which pixels may count.

    Returns:
        tuple: The same, there 0, 255 and False. No host sync.
    """
    known = confidence.isfinite()
    return (confidence.where(known, confidence.new_zeros(())),
            labels.where(known, labels.new_full((), IGNORE)),
            counts & known)


def counted_where(step: Step, name: str, view: View, labels: Tensor,
                  confidence: Tensor, counts: Tensor,
                  probs: Tensor | None = None) -> PseudoLabels:
    """Pseudo-labels with weight 1 at some pixels and 0 at the others.

    Args:
        step (Step): The iteration, whose log gets the share that counts.
        name (str): Name of the policy.
        view (View): The labelled view; pixels outside of its valid region
            don't count.
        labels (Tensor): int64, ``(N, H, W)``.
        confidence (Tensor): ``(N, H, W)``.
        counts (Tensor): bool, ``(N, H, W)``.
        probs (Tensor, optional): ``(N, C, H, W)``; what is no number
            becomes 0.
    """
    confidence, labels, counts = without_nan(confidence, labels, counts)
    if probs is not None:
        probs = probs.nan_to_num(0., 0., 0.)
    if view.valid is not None:
        counts = counts & view.valid
    weights = counts.float()
    share = weights.mean()
    step.log(f'{name}.confident_ratio', share)
    step.log(f'{name}.pseudo_weight', share)
    return PseudoLabels(
        view.name, labels, confidence, weights,
        ((torch.ones((), device=labels.device), counts), ), probs)


def check_unit(key: str, value: float, open_below: bool = False) -> None:
    """Refuse a number outside of [0, 1], or of (0, 1].

    Args:
        key (str): The argument.
        value (float): Its value.
        open_below (bool): Whether 0 is refused.

    Raises:
        ValueError: Naming the config key.
    """
    if not 0 <= value <= 1 or (open_below and value == 0):
        bracket = '(' if open_below else '['
        raise ValueError(f'model.pseudo_labels.*.{key} must lie in '
                         f'{bracket}0, 1], got {value}.')


def check_choice(key: str, value: str, *choices: str) -> None:
    """Refuse a value that is no choice.

    Args:
        key (str): The argument.
        value (str): Its value.
        choices (str): What it may be.

    Raises:
        ValueError: Naming the config key and the choices.
    """
    if value not in choices:
        raise ValueError(f'model.pseudo_labels.*.{key} must be one of '
                         f'{", ".join(map(repr, choices))}, got {value!r}.')
