"""Soft labels corrected by how near pixels are to prototypes (ProDA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import nn

from ...ops import hard_labels, rectified
from ..prototype_state import decoder_features, prototypes_of
from .labels import PseudoLabels, check_choice, check_unit, counted_where

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class PrototypeRectified(nn.Module):
    r"""Soft labels times nearness to the classes' prototypes.

    ProDA (Zhang et al., CVPR 2021):

    .. math::
        \hat y = \arg\max_c \, \omega_c p_c, \quad
        \omega = \mathrm{softmax}_c (-T \lVert f - \eta_c \rVert)

    with the teacher's features f, at their own resolution, and prototypes
    that follow the training (:class:`PrototypeState`). Where a class has no
    prototype yet its weight is 0; before there is any, labels are not
    changed. The soft labels p are stored ones in ProDA, so that they don't
    confirm themselves.

    Args:
        state (str): Name of a ``PrototypeState`` in ``model.state``.
        teacher (str): Name in ``model.teachers``.
        view (str): View to label.
        soft (str): 'stored' reads p from the stream's files (soft ones of
            ``tools/generate_pseudo_labels.py``), 'teacher' predicts it.
        temperature (float): T, > 0.
        threshold (float): Pixels whose rectified and renormalised
            probability is below weigh 0; 0 in ProDA.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 state: str = 'prototypes',
                 teacher: str = 'ema',
                 view: str = 'target',
                 soft: str = 'teacher',
                 temperature: float = 1.0,
                 threshold: float = 0.0) -> None:
        super().__init__()
        check_choice('soft', soft, 'teacher', 'stored')
        check_unit('threshold', threshold)
        if temperature <= 0:
            raise ValueError('model.pseudo_labels.*.temperature must be '
                             f'positive, got {temperature}.')
        self.state = state
        self.teacher = teacher
        self.view = view
        self.needs = (view, )
        self.soft = soft
        self.temperature = temperature
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> PseudoLabels:
        """Label the view.

        Args:
            step (Step): The iteration.
            name (str): Name of this policy.

        Raises:
            ValueError: If the state, the features or the stored labels are
                not there.
        """
        view = step.view(self.view)
        prototypes = prototypes_of(
            step, self.state, f'model.pseudo_labels.{name}.state')
        features = decoder_features(
            step.teacher_pass(self.teacher, self.view))
        if self.soft == 'teacher':
            probs = step.teacher(self.teacher, self.view)
        elif 'pseudo_probs' in view.extras:
            probs = view.extras['pseudo_probs']
        else:
            raise ValueError(
                f"model.pseudo_labels.{name}.soft = 'stored', but the view "
                f'{self.view!r} has no soft labels: set train_dataloader.'
                f'dataset.streams.{self.view}.pseudo_labels to a folder made '
                'with tools/generate_pseudo_labels.py --policy soft.')
        weights = prototypes.scores(features, self.temperature).exp()
        probs = rectified(probs, weights)
        confidence, labels = hard_labels(probs)
        # Where nothing was stored all is 0.
        there = (confidence > 0) & (confidence >= self.threshold)
        return counted_where(
            step, name, view, labels, confidence, there, probs)
