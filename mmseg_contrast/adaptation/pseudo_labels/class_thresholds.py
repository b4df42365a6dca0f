"""Each class has its own threshold, from its own confidences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmengine.dist import all_reduce
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import (
    class_thresholds,
    confidence_histogram,
    hard_labels,
    over_thresholds,
)
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

#: By rule: the portion of each class's pixels to keep, the highest
#: threshold, and whether labels go by the ratio to the threshold.
RULES = dict(cbst=(0.2, 1.0, True), spcl=(0.5, 0.9, False))


@MODELS.register_module()
class ClassThresholds(nn.Module):
    """Pixels that reach the threshold of their class weigh 1, others 0.

    One threshold for all drops rare classes first, since nets are less sure
    of them. Here a class's threshold is the confidence that a portion of the
    pixels predicted as this class reaches:

    - 'cbst' (Zou et al., ECCV 2018): the portion is 0.2 at first, and a
      pixel's label is the class with the highest ``probability /
      threshold``.
    - 'spcl' (Xie et al., 2021; Li et al., CVPR 2019, have the same): the
      median, but at most 0.9; the label is the most likely class.

    The published methods compute them once over the whole target:
    ``tools/generate_pseudo_labels.py`` does. This policy follows the
    training: a histogram of each class's confidences fades by ``momentum``
    with each batch that has the class, and takes in the batch first. A class
    not in the batch is not touched. It is merged across ranks, and saved.

    Args:
        num_classes (int): Classes of the student.
        teacher (str): Name in ``model.teachers``, or 'student' for the
            student's own current pass, without its gradients.
        view (str): View to label.
        rule (str): 'cbst' or 'spcl'.
        portion (float, optional): In (0, 1]; None: 0.2 and 0.5.
        ceiling (float, optional): Highest threshold, in [0, 1]; None: 1 and
            0.9.
        momentum (float): Weight of what was before, in [0, 1).
        thresholds (Sequence[float], optional): Fixed ones, one for each
            class, such as the tool's; nothing is counted then.
        bins (int): Of a histogram; a power of two.

    Raises:
        ValueError: If an argument is out of range.
    """

    histogram: Tensor
    fixed: Tensor

    def __init__(self,
                 num_classes: int,
                 teacher: str = 'ema',
                 view: str = 'target',
                 rule: str = 'spcl',
                 portion: float | None = None,
                 ceiling: float | None = None,
                 momentum: float = 0.99,
                 thresholds: Sequence[float] | None = None,
                 bins: int = 4096) -> None:
        super().__init__()
        check_choice('rule', rule, *RULES)
        usual = RULES[rule]
        self.portion = usual[0] if portion is None else portion
        self.ceiling = usual[1] if ceiling is None else ceiling
        self.ratio = usual[2]
        check_unit('portion', self.portion, open_below=True)
        check_unit('ceiling', self.ceiling)
        if not 0 <= momentum < 1:
            raise ValueError('model.pseudo_labels.*.momentum must lie in '
                             f'[0, 1), got {momentum}.')
        if bins < 2 or bins & (bins - 1):
            raise ValueError('model.pseudo_labels.*.bins must be a power of '
                             f'two, got {bins}.')
        if thresholds is not None and len(thresholds) != num_classes:
            raise ValueError(
                'model.pseudo_labels.*.thresholds must have one number for '
                f'each of the {num_classes} classes, got {len(thresholds)}.')
        self.num_classes = num_classes
        self.teacher = known_teacher(teacher)
        self.view = view
        self.needs = (view, )
        self.rule = rule
        self.momentum = momentum
        self.bins = bins
        self.is_fixed = thresholds is not None
        self.predictor = Predictor(teacher, view)
        self.register_buffer('fixed', torch.tensor(
            list(thresholds or ()), dtype=torch.float32), persistent=False)
        if not self.is_fixed:
            self.register_buffer('histogram', torch.zeros(num_classes, bins))

    def thresholds(self) -> Tensor:
        """The threshold of each class, float32, ``(C,)``."""
        if self.is_fixed:
            return self.fixed
        return class_thresholds(self.histogram, self.portion, self.ceiling)

    @torch.no_grad()
    def count(self, probs: Tensor, valid: Tensor | None = None) -> None:
        """Take in the confidences of a batch; all ranks must.

        Args:
            probs (Tensor): ``(N, C, H, W)``.
            valid (Tensor, optional): bool, ``(N, H, W)``; others don't count.
        """
        confidence, labels = hard_labels(probs)
        new = confidence_histogram(
            confidence, labels, self.num_classes, self.bins, valid)
        all_reduce(new)
        seen = (new.sum(1, keepdim=True) > 0).to(self.histogram.dtype)
        self.histogram *= 1 - (1 - self.momentum) * seen
        self.histogram += new

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> PseudoLabels:
        """Label the view.

        Args:
            step (Step): The iteration.
            name (str): Name of this policy.
        """
        view = step.view(self.view)
        probs = self.predictor.probabilities(step)
        if not self.is_fixed:
            self.count(probs, view.valid)
        thresholds = self.thresholds()
        labels, confidence, sure = over_thresholds(
            probs, thresholds, self.ratio)
        step.log(f'{name}.mean_threshold', thresholds.mean())
        return counted_where(step, name, view, labels, confidence, sure)
