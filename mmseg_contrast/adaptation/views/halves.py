"""A batch of which half is of one view and half of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class Halves(nn.Module):
    """The first samples of two labelled views, as one batch of the same size.

    A batch of N has N // 2 samples of the first view and the rest of the
    second; that of the published MIC (mode ``separate``), which needs N = 2,
    is one of each. Labels, weights and valid regions come along. The result's
    ``extras['origin']`` is True in the samples of the first view.

    Args:
        first (str): A labelled view.
        second (str): Another, with images of the same size.
    """

    def __init__(self,
                 first: str = 'source',
                 second: str = 'target_labelled') -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.needs = (first, second)

    def forward(self, step: Step, name: str) -> View:
        """The joined view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.

        Raises:
            ValueError: If a view has no labels or shapes differ.
        """
        views = [step.view(self.first), step.view(self.second)]
        for view in views:
            if view.labels is None:
                raise ValueError(
                    f'model.views.{name} joins views with labels, but '
                    f'{view.name!r} has none: name a PseudoLabelled view.')
        one, two = (tuple(view.images.shape) for view in views)
        if one != two:
            raise ValueError(
                f'model.views.{name} joins images of one shape, but '
                f'{self.first!r} is {one} and {self.second!r} is {two}: give '
                'both streams the same crop size and number.')
        total = one[0]
        taken = [total // 2, total - total // 2]

        def joined(maps: list[Tensor]) -> Tensor:
            return torch.cat([map_[:count] for map_, count in zip(
                maps, taken, strict=True)])

        blank = torch.zeros_like(views[0].labels, dtype=torch.bool)
        return View(
            name=name,
            images=joined([view.images for view in views]),
            domain=f'{views[0].domain}+{views[1].domain}',
            labels=joined([view.labels for view in views]),
            weights=joined([_weights(view) for view in views]),
            weight_parts=_parts(views, taken),
            valid=joined([~blank if view.valid is None else view.valid
                          for view in views]),
            metas=[meta for view, count in zip(views, taken, strict=True)
                   for meta in view.metas[:count]],
            extras=dict(origin=joined([~blank, blank])))


def _weights(view: View) -> Tensor:
    if view.weights is None:
        return torch.ones_like(view.images[:, 0], dtype=torch.float32)
    return view.weights


def _parts(views: list[View], taken: list[int]
           ) -> tuple[tuple[Tensor, Tensor], ...] | None:
    """Weights as masks, each 0 in the other view's samples."""
    result = []
    for i, (view, count) in enumerate(zip(views, taken, strict=True)):
        everywhere = torch.ones_like(view.labels, dtype=torch.bool)
        parts = view.weight_parts
        if parts is None:
            if view.weights is not None:
                return None
            parts = ((torch.ones((), device=everywhere.device), everywhere), )
        other = torch.zeros_like(everywhere)[:taken[1 - i]]
        for scale, mask in parts:
            halves = [mask[:count], other]
            if scale.dim():
                scales = [scale[:count], scale.new_zeros(len(other))]
                scale = torch.cat(scales if i == 0 else scales[::-1])
            result.append(
                (scale, torch.cat(halves if i == 0 else halves[::-1])))
    return tuple(result)
