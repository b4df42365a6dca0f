"""A crop of each image that shows many classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import choose_offsets, crop_windows, draw_offsets, send
from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class BalancedCrop(nn.Module):
    """Of some random boxes the one with the most balanced pseudo-labels.

    The class-balanced crop (CBC) of SePiCo (Xie et al., 2023): what
    rare-class sampling does for the source, where there are no labels. See
    :func:`mmseg_contrast.ops.balance_scores` for the score; of equal boxes
    the first is taken. Pixels outside the view's valid region count in the
    score, as in the published code.

    All that is known of the pixels travels with the crop. Its pseudo-labels
    do not: a second policy has the teacher see the crop itself::

        views=dict(target_crop=dict(
            type='BalancedCrop', view='target', pseudo_label='target_full',
            size=(640, 640))),
        pseudo_labels=dict(
            target_full=dict(type='ConfidentFraction', view='target'),
            target=dict(type='ConfidentFraction', view='target_crop'))

    Args:
        num_classes (int): Classes of the student.
        size (Sequence[int]): Height and width of the crop.
        view (str): The view to crop.
        pseudo_label (str): Name in ``model.pseudo_labels`` of a policy for
            this view.
        tries (int): Boxes to choose from, >= 1.
        max_ratio (float): A box whose most frequent class covers this much
            or more is taken only if all do, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 size: Sequence[int],
                 view: str = 'target',
                 pseudo_label: str = 'target_full',
                 tries: int = 10,
                 max_ratio: float = 0.75) -> None:
        super().__init__()
        if len(size) != 2 or min(size) < 1:
            raise ValueError('model.views.*.size must be the height and the '
                             f'width of the crop, got {size}.')
        if tries < 1:
            raise ValueError(
                f'model.views.*.tries must be at least 1, got {tries}.')
        if not 0 <= max_ratio <= 1:
            raise ValueError('model.views.*.max_ratio must lie in [0, 1], '
                             f'got {max_ratio}.')
        self.num_classes = num_classes
        self.size = (int(size[0]), int(size[1]))
        self.view = view
        self.pseudo_label = pseudo_label
        self.needs = (view, )
        self.needs_pseudo_labels = (pseudo_label, )
        self.tries = tries
        self.max_ratio = max_ratio

    def draw(self, samples: int, height: int, width: int,
             generator: torch.Generator) -> Tensor:
        """The boxes to choose from.

        Args:
            samples (int): Batch size N.
            height (int): Height of the view.
            width (int): Width of the view.
            generator (torch.Generator): CPU generator.

        Returns:
            Tensor: Their ``(top, left)``, int64, ``(N, tries, 2)``, on the
            CPU.
        """
        return draw_offsets(
            samples, self.tries, height, width, self.size, generator)

    def crop(self, view: View, offsets: Tensor, name: str) -> View:
        """Cut one window out of each image.

        Args:
            view (View): Images ``(N, 3, H, W)``.
            offsets (Tensor): Their ``(top, left)``, int64, ``(N, 2)``.
            name (str): Name of the result.
        """
        def cut(maps: Tensor) -> Tensor:
            return crop_windows(maps, offsets, self.size)

        def known(maps: Tensor | None) -> Tensor | None:
            return None if maps is None else cut(maps)

        parts = view.weight_parts
        if parts is not None:
            parts = tuple((scale, cut(mask)) for scale, mask in parts)
        return view.replace(
            name=name,
            images=cut(view.images),
            labels=known(view.labels),
            probs=known(view.probs),
            weights=known(view.weights),
            weight_parts=parts,
            valid=known(view.valid),
            metas=[self._meta(meta) for meta in view.metas],
            extras={key: cut(maps) for key, maps in view.extras.items()})

    def _meta(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Metainfo with the sizes of the crop."""
        sizes = dict(img_shape=self.size, pad_shape=self.size,
                     padding_size=(0, 0, 0, 0))
        return {**meta, **{
            key: value for key, value in sizes.items() if key in meta}}

    @torch.no_grad()
    def forward(self, step: Step, name: str) -> View:
        """The cropped view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.

        Raises:
            ValueError: If the crop is larger than the view.
        """
        view = step.view(self.view)
        samples, _, height, width = view.images.shape
        if self.size[0] > height or self.size[1] > width:
            raise ValueError(
                f'model.views.{name}.size = {self.size} does not fit into '
                f'the view {self.view!r} of {height} x {width} pixels: use a '
                'smaller one, or a larger crop_size of that stream.')
        offsets = self.draw(samples, height, width, step.generator(name))
        labels = step.pseudo_label(self.pseudo_label).labels
        chosen = choose_offsets(
            labels, send(offsets, labels.device), self.size,
            self.num_classes, self.max_ratio)
        return self.crop(view, chosen, name)
