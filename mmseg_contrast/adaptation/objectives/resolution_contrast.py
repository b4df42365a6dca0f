"""Contrast of pixels within the context and with the detail (CLUDA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...models import HRDASegmentor
from ...ops import (
    bilinear_at,
    centres,
    forked_rng,
    known_labels,
    labels_at,
    places_in_box,
    resolution_contrast,
    within_box,
)

if TYPE_CHECKING:
    from ..step import Step
    from ..view import View


@MODELS.register_module()
class ResolutionContrast(nn.Module):
    """CLUDA's contrast of multi-level features (Vayyat et al., 2022).

    Features are what the decode head classifies: its fusion of all stages of
    the backbone. They are brought to a small grid over the whole image, of
    which all pixels are anchors and keys, those of the batch as one set.

    With HRDA, pixels of the context are compared with each other and with
    those of the detail; a weighter on the context, trained with the rest,
    says how much each pair counts in which of both
    (:func:`mmseg_contrast.ops.resolution_contrast`). Outside of the detail's
    box that is 0: there is one resolution only, and the context stands in
    for the detail. Any other student has the contrast within its one map.

    Labels, weights and the box are found by place: row and column of the
    grid, for each image of the batch. Ignored pixels, and those that a
    pseudo-label policy leaves out (margins), are no anchors and no keys.

    Args:
        student (nn.Module): The segmentor.
        num_classes (int): Its classes.
        views (Sequence[str]): Labelled views, such as mixed ones. Each has a
            loss of its own; they are added up.
        weight (float): Factor of the loss, >= 0.
        tau (float): Temperature, > 0; published: none, that is 1.
        size (int): Rows and columns of the grid at most; it has no more than
            the map itself.
        start (int): Iterations before it begins.
        weighter (dict, optional): Of HRDA, what says how much a pair counts
            in which loss: a head with one logit on the context's stages, as
            published. Completed as HRDAHead's ``attention``, so ``dict()``
            is SegFormer's decoder with 256 channels. None: a 1 x 1
            convolution on what the decode head classifies in the context.

    Raises:
        ValueError: If an argument is out of range, or the decode head has no
            classifier of mmseg's kind, or there is nothing to weigh.
    """

    update_norm = False

    def __init__(self,
                 student: nn.Module,
                 num_classes: int,
                 views: Sequence[str] = ('source', 'mixed_strong'),
                 weight: float = 1.,
                 tau: float = 1.,
                 size: int = 65,
                 start: int = 0,
                 weighter: dict | None = None) -> None:
        super().__init__()
        where = 'model.objectives.*'
        if isinstance(views, str) or not views:
            raise ValueError(
                f'{where}.views must be a list of views, got {views!r}.')
        for key, value, least in (('weight', weight, 0), ('size', size, 1),
                                  ('start', start, 0)):
            if value < least:
                raise ValueError(f'{where}.{key} must be at least {least}, '
                                 f'got {value}.')
        if not tau > 0:
            raise ValueError(f'{where}.tau must be above 0, got {tau}.')
        self.views = self.needs = tuple(views)
        self.num_classes = num_classes
        self.weight = weight
        self.tau = tau
        self.size = size
        self.start = start
        self.weighter: nn.Module | None = None
        if not isinstance(student, HRDASegmentor):
            if weighter is not None:
                raise ValueError(
                    f'{where}.weighter shares pixels between two resolutions,'
                    f' but model.segmentor.type = {type(student).__name__} '
                    'has one: remove it.')
            return
        classifier = getattr(student.decode_head.head, 'conv_seg', None)
        if not isinstance(classifier, nn.Conv2d):
            raise ValueError(_not_seen(where))
        # Draws of its own: another part's weights are the same without it.
        with torch.random.fork_rng(devices=[]):
            if weighter is not None:
                # Under the name by which configs raise the rate of heads.
                self.weighter = nn.ModuleDict(dict(
                    head=student.decode_head.companion(weighter)))
                return
            self.weighter = nn.Conv2d(classifier.in_channels, 1, 1)
        # Both losses alike at first.
        nn.init.zeros_(self.weighter.weight)
        nn.init.zeros_(self.weighter.bias)

    def init_weights(self) -> None:
        """Those of the weighter, if it is a head."""
        if isinstance(self.weighter, nn.ModuleDict):
            with torch.random.fork_rng(devices=[]):
                self.weighter['head'].init_weights()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The contrast of each view, times the weight.

        Args:
            step (Step): The iteration.

        Returns:
            dict[str, Tensor]: ``loss_<view>`` of each, 0-d.

        Raises:
            ValueError: If a view has no labels, or the features can't be
                seen.
        """
        return {f'loss_{name}': self._contrast(step, name)
                for name in self.views}

    def _contrast(self, step: Step, name: str) -> Tensor:
        view = step.view(name)
        if view.labels is None:
            raise ValueError(
                f'ResolutionContrast on the view {name!r} needs labels, '
                'which it has not: name a labelled stream, or a mixed or '
                'pseudo-labelled view.')
        (context, _), *closer = step.student(name).resolutions
        if context is None:
            raise ValueError(_not_seen('model.objectives.*'))
        if step.iteration < self.start:
            return self._zero(context)
        height, width = view.labels.shape[-2:]
        rows, columns = (
            centres(min(self.size, cells), side, context.device)
            for cells, side in zip(context.shape[-2:], (height, width),
                                   strict=True))
        coarse = bilinear_at(context, rows / height, columns / width)
        labels, weights = self._targets(
            view, view.labels, (len(rows), len(columns)))
        detail = attention = None
        for features, box in closer:  # at most one
            assert features is not None and box is not None
            inside = within_box(rows, columns, box)
            fine = bilinear_at(features, *places_in_box(rows, columns, box))
            # Keys outside of the box would be vectors of 0 otherwise, with
            # the whole weight of their pairs.
            detail = _rows(fine.where(inside, coarse))
            scores = self._scores(step, name, coarse, (
                rows / height, columns / width)).to(coarse.dtype).sigmoid()
            step.log(f'{name}.context_attention', _mean(scores, inside))
            attention = (scores * inside).flatten()
        return self.weight * resolution_contrast(
            _rows(coarse), labels.flatten(), detail, attention,
            None if weights is None else weights.flatten(), self.tau)

    def _scores(self, step: Step, name: str, context: Tensor,
                places: tuple[Tensor, Tensor]) -> Tensor:
        """What the weighter gives for each place, ``(N, 1, r, c)``."""
        if not isinstance(self.weighter, nn.ModuleDict):
            assert self.weighter is not None
            return self.weighter(context)
        # Its dropout draws from torch's own generators.
        with forked_rng(context.device, step.seed, step.rank, step.iteration,
                        type(self).__name__, name):
            maps = self.weighter['head'](step.student(name).features)
        return bilinear_at(maps, *places)

    def _targets(self, view: View, labels: Tensor, size: Sequence[int]
                 ) -> tuple[Tensor, Tensor | None]:
        """Labels and weights of the grid, ``(N, r, c)``."""
        labels = labels.where(known_labels(labels, self.num_classes), -1)
        if view.weight_parts is not None:
            # By the masks: without a confident pixel the share q is 0, which
            # says nothing of a single pixel.
            counts = torch.stack(
                [mask for _, mask in view.weight_parts]).any(0)
            labels = labels.where(counts, -1)
        elif view.weights is not None:
            labels = labels.where(view.weights > 0, -1)

        def at_centres(maps: Tensor) -> Tensor:
            return labels_at(maps, size, 'centre', self.num_classes)

        return at_centres(labels), (
            None if view.weights is None else at_centres(view.weights))

    def _zero(self, features: Tensor) -> Tensor:
        """A loss of 0 that reaches every parameter of this part."""
        return sum((one.sum() * 0 for one in self.parameters()),
                   features.sum() * 0)


def _mean(maps: Tensor, inside: Tensor) -> Tensor:
    """Mean of maps ``(N, 1, r, c)`` over the places inside."""
    inside = inside.expand_as(maps)
    return (maps.detach() * inside).sum() / inside.sum().clamp_min(1)


def _rows(maps: Tensor) -> Tensor:
    """Maps ``(N, D, r, c)`` as one vector for each place."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _not_seen(where: str) -> str:
    return (f"{where} = ResolutionContrast compares what the decode head "
            "classifies, but this one doesn't end with mmseg's cls_seg: use "
            'another decode head.')
