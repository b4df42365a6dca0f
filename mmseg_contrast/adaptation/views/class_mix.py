"""ClassMix across domains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import choose_classes, class_mask, mix, present_classes, send
from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class ClassMix(nn.Module):
    """Paste half of the source's classes over the target.

    Olsson et al., 2021 (ClassMix); Tranheden et al., 2021 (DACS). Pasted
    pixels keep their labels and weigh 1; the others have the pseudo-labels
    and their weights. The result's ``extras['origin']`` is True where a
    pixel comes from the source.

    Args:
        num_classes (int): Classes of the student.
        source (str): Labelled view.
        target (str): View that is pasted over.
        pseudo_label (str): Name in ``model.pseudo_labels`` of a policy for
            the target view.
        class_scope (str): 'batch' draws among the classes of the whole
            source batch (published DAFormer), 'sample' among the sample's
            own (published DACS).
        mix_ignore (bool): Whether ignored source pixels are a class that can
            be drawn (both published codes). They carry no loss, but hide
            part of the target.

    Raises:
        ValueError: If ``class_scope`` is neither of the two.
    """

    def __init__(self,
                 num_classes: int,
                 source: str = 'source',
                 target: str = 'target',
                 pseudo_label: str = 'target',
                 class_scope: str = 'batch',
                 mix_ignore: bool = True) -> None:
        super().__init__()
        if class_scope not in ('batch', 'sample'):
            raise ValueError(
                "model.views.*.class_scope must be 'batch' or 'sample', got "
                f'{class_scope!r}.')
        self.num_classes = num_classes
        self.source = source
        self.target = target
        self.pseudo_label = pseudo_label
        self.needs = (source, target)
        self.needs_pseudo_labels = (pseudo_label, )
        self.class_scope = class_scope
        self.mix_ignore = mix_ignore

    def choose(self, present: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the classes to paste.

        Args:
            present (Tensor): bool, ``(N, C + 1)``.
            generator (torch.Generator): CPU generator.

        Returns:
            Tensor: bool, ``(N, C + 1)``; half of the present ones, rounded
            up.
        """
        scores = torch.rand(present.shape, generator=generator)
        return choose_classes(
            present, send(scores, present.device))

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> View:
        """The mixed view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.

        Raises:
            ValueError: If the views' shapes differ or the source has no
                labels.
        """
        source, target = step.view(self.source), step.view(self.target)
        if source.labels is None:
            raise ValueError(
                f'model.views.{name}.source = {self.source!r} has no labels.')
        if source.images.shape != target.images.shape:
            raise ValueError(
                f'model.views.{name} mixes images of one shape, but '
                f'{self.source!r} is {tuple(source.images.shape)} and '
                f'{self.target!r} is {tuple(target.images.shape)}: give both '
                'streams the same crop size and ratio in train_dataloader.')
        pseudo = step.pseudo_label(self.pseudo_label)
        device = source.images.device
        present = present_classes(source.labels, self.num_classes,
                                  self.class_scope, self.mix_ignore)
        chosen = self.choose(present, step.generator(name))
        origin = class_mask(source.labels, chosen)
        one = torch.ones((), device=device)
        weights = torch.ones_like(pseudo.weights)
        if source.weights is not None:
            weights = source.weights
        parts = ((one, origin), *(
            (scale, mask & ~origin) for scale, mask in pseudo.parts))
        return View(
            name=name,
            images=mix(origin, source.images, target.images),
            domain=f'{source.domain}+{target.domain}',
            labels=mix(origin, source.labels, pseudo.labels),
            weights=mix(origin, weights, pseudo.weights),
            weight_parts=parts if source.weights is None else None,
            metas=target.metas,
            extras=dict(origin=origin))
