"""A view with the labels that a policy gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg.registry import MODELS
from torch import nn

from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class PseudoLabelled(nn.Module):
    """The same images, with pseudo-labels and their weights.

    What self-training without mixing learns from:
    ``Segmentation(view='target_labelled')``.

    Args:
        view (str): The view whose images are taken, such as a strongly
            augmented target.
        pseudo_label (str): Name in ``model.pseudo_labels`` of a policy for
            the same pixels.
    """

    def __init__(self, view: str = 'target', pseudo_label: str = 'target'
                 ) -> None:
        super().__init__()
        self.view = view
        self.pseudo_label = pseudo_label
        self.needs = (view, )
        self.needs_pseudo_labels = (pseudo_label, )

    def forward(self, step: Step, name: str) -> View:
        """The labelled view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.

        Raises:
            ValueError: If the labels are of another size.
        """
        view = step.view(self.view)
        pseudo = step.pseudo_label(self.pseudo_label)
        if pseudo.labels.shape[-2:] != view.images.shape[-2:]:
            raise ValueError(
                f'model.views.{name}.pseudo_label = {self.pseudo_label!r} '
                f'labels {tuple(pseudo.labels.shape[-2:])} pixels, but '
                f'{self.view!r} has {tuple(view.images.shape[-2:])}: name a '
                'policy for the same crop.')
        return view.replace(
            name=name, labels=pseudo.labels, weights=pseudo.weights,
            weight_parts=pseudo.parts)
