"""Student and teacher see a pixel as near to the same prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import prototype_consistency
from ..prototype_state import decoder_features, prototypes_of

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class PrototypeConsistency(nn.Module):
    r"""Divergence between soft assignments to prototypes.

    ProDA (Zhang et al., CVPR 2021): the teacher sees a view weakly, the
    student strongly augmented, and

    .. math::
        \ell = \mathrm{mean} \, z (\log z - \log z'), \quad
        z = \mathrm{softmax}_c (-T \lVert f - \eta_c \rVert)

    over pixels and classes. No gradient goes into z or the prototypes.

    Args:
        state (str): Name of a ``PrototypeState`` in ``model.state``.
        teacher (str): Name in ``model.teachers``.
        weak (str): The teacher's view.
        strong (str): The student's, of the same pixels.
        temperature (float): T, > 0.
        weight (float): Factor; 10 in ProDA's published commands.
        update_norm (bool, optional): Whether the student's pass records
            batch-norm statistics. None: if the weight isn't 0.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(self,
                 state: str = 'prototypes',
                 teacher: str = 'ema',
                 weak: str = 'target',
                 strong: str = 'target_strong',
                 temperature: float = 1.0,
                 weight: float = 10.0,
                 update_norm: bool | None = None) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError('model.objectives.*.temperature must be '
                             f'positive, got {temperature}.')
        self.state = state
        self.teacher = teacher
        self.needs_teacher = teacher
        self.weak = weak
        self.strong = strong
        self.needs = (weak, strong)
        self.temperature = temperature
        self.weight = weight
        self.update_norm = weight != 0 if update_norm is None else update_norm

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The divergence.

        Args:
            step (Step): The iteration.

        Returns:
            dict[str, Tensor]: ``loss_consistency``.

        Raises:
            ValueError: If the state or the features are not there.
        """
        prototypes = prototypes_of(
            step, self.state, 'PrototypeConsistency.state')
        student = decoder_features(step.student(self.strong))
        teacher = decoder_features(
            step.teacher_pass(self.teacher, self.weak))
        if teacher.shape[-2:] != student.shape[-2:]:
            teacher = F.interpolate(teacher, student.shape[-2:],
                                    mode='bilinear', align_corners=False)
        loss = prototype_consistency(
            prototypes.scores(student, self.temperature),
            prototypes.scores(teacher, self.temperature))
        return dict(loss_consistency=self.weight * loss)
