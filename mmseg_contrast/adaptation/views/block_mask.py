"""Images with random blocks hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import block_grid, hide_blocks, send
from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class BlockMask(nn.Module):
    """Hide random blocks of a view's images, keep all its labels.

    Masked image consistency, MIC (Hoyer et al., CVPR 2023): the student
    learns to say what is hidden from what surrounds it. The labels are those
    of the whole image, by the teacher, and count in hidden and visible pixels
    alike. With the published colours on the target::

        views=dict(
            target_labelled=dict(type='PseudoLabelled', view='target'),
            target_strong=dict(
                type='StrongAugment', view='target_labelled',
                share_order=True),
            masked=dict(type='BlockMask', view='target_strong')),
        objectives=dict(masked=dict(type='Segmentation', view='masked'))

    (published as mode ``separatetrgaug``). On source and target, without
    colours (``separate``)::

        views=dict(
            target_labelled=dict(type='PseudoLabelled', view='target'),
            halves=dict(
                type='Halves', first='source', second='target_labelled'),
            masked=dict(type='BlockMask', view='halves'))

    A threshold or a teacher of its own is another policy in
    ``model.pseudo_labels`` that ``PseudoLabelled`` names.

    Args:
        view (str): The view to hide blocks of.
        block (int): Side of a block in pixels; 64 for HRDA, 32 for DAFormer.
            Sides of the image are rounded to whole blocks, which are
            stretched to fill it.
        ratio (float): Share of hidden blocks, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 view: str = 'target_strong',
                 block: int = 64,
                 ratio: float = 0.7) -> None:
        super().__init__()
        if block < 1:
            raise ValueError(
                f'model.views.*.block must be at least 1, got {block}.')
        if not 0 <= ratio <= 1:
            raise ValueError(
                f'model.views.*.ratio must lie in [0, 1], got {ratio}.')
        self.view = view
        self.needs = (view, )
        self.block = block
        self.ratio = ratio

    def draw(self, samples: int, height: int, width: int,
             generator: torch.Generator) -> Tensor:
        """A number for each block.

        Args:
            samples (int): Batch size N.
            height (int): Height of the images.
            width (int): Width of the images.
            generator (torch.Generator): CPU generator.

        Returns:
            Tensor: In [0, 1), float32, ``(N, h, w)``, on the CPU; a block
            stays where it is larger than the ratio.
        """
        return torch.rand(
            samples, *block_grid(height, width, self.block),
            generator=generator)

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> View:
        """The masked view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.
        """
        view = step.view(self.view)
        images = view.images
        samples, _, height, width = images.shape
        uniforms = self.draw(samples, height, width, step.generator(name))
        return view.replace(name=name, images=hide_blocks(
            images, send(uniforms, images.device),
            self.ratio))
