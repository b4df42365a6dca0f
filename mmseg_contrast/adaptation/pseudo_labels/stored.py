"""Labels that were generated before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import nn

from ...ops import hard_labels, known_labels
from .labels import PseudoLabels, check_unit, counted_where

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class StoredPseudoLabels(nn.Module):
    """Labels from files, which the stream reads beside the image.

    ``tools/generate_pseudo_labels.py`` writes them; the stream's
    ``pseudo_labels`` names the folder. Labelled pixels weigh 1, others 0.
    The confidence of a hard label is 1.

    Args:
        num_classes (int): Classes of the student.
        view (str): The stream.
        threshold (float): For soft labels: pixels below it weigh 0.
        min_share (float): An image of which a smaller share of pixels is
            labelled (after cropping) weighs 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 view: str = 'target',
                 threshold: float = 0.,
                 min_share: float = 0.) -> None:
        super().__init__()
        check_unit('threshold', threshold)
        check_unit('min_share', min_share)
        self.num_classes = num_classes
        self.view = view
        self.needs = (view, )
        self.threshold = threshold
        self.min_share = min_share

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> PseudoLabels:
        """The labels of the view.

        Args:
            step (Step): The iteration.
            name (str): Name of this policy.

        Raises:
            ValueError: If the stream reads none, or other classes.
        """
        view = step.view(self.view)
        probs = view.extras.get('pseudo_probs')
        if probs is not None:
            if probs.shape[1] != self.num_classes:
                raise ValueError(
                    f'model.pseudo_labels.{name} reads soft labels of '
                    f'{probs.shape[1]} classes, but the model has '
                    f'{self.num_classes}.')
            confidence, labels = hard_labels(probs)
            # Pixels without a label have zeros.
            there = confidence > 0
            labels = labels.where(there, labels.new_full((), 255))
            there = there & (confidence >= self.threshold)
        elif 'pseudo_label' in view.extras:
            labels = view.extras['pseudo_label']
            there = known_labels(labels, self.num_classes)
            confidence = there.float()
        else:
            raise ValueError(
                f'model.pseudo_labels.{name} reads stored labels of the view '
                f'{self.view!r}, which has none: set train_dataloader.'
                f'dataset.streams.{self.view}.pseudo_labels to the folder of '
                'tools/generate_pseudo_labels.py.')
        enough = there.float().mean((1, 2), keepdim=True) >= self.min_share
        return counted_where(
            step, name, view, labels, confidence, there & enough, probs)
