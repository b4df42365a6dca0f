"""Contrast of pixels as a head of a segmentor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from ..ops import (
    check_choice,
    contrast_regularizer,
    generator_at,
    labels_at,
    send,
    unit,
)
from .clock import Clock

FEATURES = ('backbone', 'decoder', 'logits')


@dataclass
class Pixels:
    """Embedded pixels of a batch with what is known of them.

    Args:
        embeddings (Tensor): ``(B, D, h, w)``.
        labels (Tensor): At the embeddings' resolution, int64, ``(B, h, w)``.
        logits (Tensor, optional): The student's, detached, ``(B, C, h, w)``.
        weights (Tensor, optional): Of the pairs, float, ``(B, h, w)``.
        teacher (Tensor, optional): The teacher's embeddings of the same
            pixels, ``(B, D', h, w)``.
    """

    embeddings: Tensor
    labels: Tensor
    logits: Tensor | None = None
    weights: Tensor | None = None
    teacher: Tensor | None = None


@MODELS.register_module()
class ContrastHead(BaseModule):
    """Projects features, and contrasts them with what a bank knows.

    By itself it is an auxiliary head of any segmentor (supervised contrast).
    In adaptation the objective :class:`.Contrast` claims it: which views are
    anchors and which fill the bank is then said there. See
    :mod:`mmseg_contrast.ops.contrast` for the loss.

    Args:
        in_channels (int or Sequence[int]): Width of the features, of each
            of several with ``input_transform``.
        num_classes (int): Number of classes C.
        channels (int): Length of an embedding, D.
        bank (dict): What anchors are compared with, such as
            ``dict(type='PrototypeBank')``; it gets ``num_classes``,
            ``channels`` and ``ignore_index`` from here.
        in_index (int or Sequence[int]): Which of the backbone's outputs.
        input_transform (str, optional): 'resize_concat' resizes several
            outputs to the size of the first and stacks them.
        features (str): 'backbone' (the neck's, where there is one),
            'decoder', what the decode head classifies, or 'logits', what
            comes out. The last two need a segmentor of the type
            ``ContrastEncoderDecoder``, or the objective.
        detach (bool): Whether the features get no gradient.
        projection (dict): Arguments of :class:`.projection.Projection`.
        normalize (str): What is scaled to length 1: 'all' embeddings, the
            'anchors' alone (SDCA and ProCA keep statistics of the features
            as they are), or 'none'.
        sampler (dict): Which pixels are anchors.
        label_rule (str): How labels come to the embeddings' resolution:
            'nearest', 'centre', 'ratio', 'majority' or 'stride', see
            :func:`mmseg_contrast.ops.labels_at`.
        min_ratio (float): For 'ratio', in [0, 1].
        correct_only (bool): In supervised training, whether only pixels
            count that the decode head has right.
        tau (float): Temperature, > 0.
        base_tau (float, optional): The loss is times ``tau / base_tau``.
        own (str): 'energy' or 'positive', see
            :func:`mmseg_contrast.ops.contrast_loss`.
        reduce_positives (str): 'mean' or 'lse', see there.
        mixing (dict, optional): Synthetic negatives, such as
            ``dict(type='HardNegativeMixing')``.
        regularizer (float): Weight of
            :func:`mmseg_contrast.ops.contrast_regularizer`.
        loss_weight (float): Weight of the loss.
        start (int): First iteration with a loss; the bank is filled before.
        ramp (int): Iterations over which the weight then rises from 0.
        update (str): Whether the bank takes in a batch 'before' or 'after'
            the loss on it.
        align_corners (bool): For resizing features.
        ignore_index (int): Label that is ignored.
        init_cfg (dict, optional): See mmengine's BaseModule.

    Raises:
        ValueError: If an argument is out of range.
    """

    #: What a teacher's copy of this module goes without.
    ema_exclude = ('bank', )

    def __init__(self,
                 in_channels: int | Sequence[int],
                 num_classes: int,
                 bank: dict,
                 channels: int = 256,
                 in_index: int | Sequence[int] = -1,
                 input_transform: str | None = None,
                 features: str = 'backbone',
                 detach: bool = False,
                 projection: dict | None = None,
                 normalize: str = 'all',
                 sampler: dict = dict(type='AllPixels'),  # noqa: B006
                 label_rule: str = 'nearest',
                 min_ratio: float = 0.75,
                 correct_only: bool = False,
                 tau: float = 0.1,
                 base_tau: float | None = None,
                 own: str = 'energy',
                 reduce_positives: str = 'mean',
                 mixing: dict | None = None,
                 regularizer: float = 0.,
                 loss_weight: float = 1.,
                 start: int = 0,
                 ramp: int = 0,
                 update: str = 'before',
                 align_corners: bool = False,
                 ignore_index: int = 255,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        name = 'ContrastHead'
        check_choice(f'{name}.features', features, FEATURES)
        check_choice(f'{name}.update', update, ('before', 'after'))
        check_choice(f'{name}.own', own, ('energy', 'positive'))
        check_choice(f'{name}.normalize', normalize,
                     ('all', 'anchors', 'none'))
        for key, value in (('start', start), ('ramp', ramp),
                           ('loss_weight', loss_weight)):
            if value < 0:
                raise ValueError(f'{name}.{key} = {value} must be >= 0')
        for key, heat in (('tau', tau), ('base_tau', base_tau)):
            if heat is not None and not heat > 0:
                raise ValueError(f'{name}.{key} = {heat} must be above 0')
        if input_transform is not None:
            check_choice(f'{name}.input_transform', input_transform,
                         ('resize_concat', ))
        lists = [isinstance(one, Sequence) for one in (in_channels, in_index)]
        widths = _tuple(in_channels)
        self.in_index = _tuple(in_index)
        if lists != [input_transform is not None] * 2 or (
                len(widths) != len(self.in_index)):
            raise ValueError(
                f'{name}.in_channels and in_index must be lists of the same '
                "length with input_transform = 'resize_concat', and numbers "
                f'without, got {in_channels} and {in_index}')
        self.num_classes = num_classes
        self.channels = channels
        self.features = features
        self.detach = detach
        self.normalize = normalize
        self.label_rule = label_rule
        self.min_ratio = min_ratio
        self.correct_only = correct_only
        self.tau = tau
        self.base_tau = base_tau
        self.own = own
        self.reduce_positives = reduce_positives
        self.regularizer = regularizer
        self.loss_weight = loss_weight
        self.start = start
        self.ramp = ramp
        self.update = update
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        # Draws of its own: another head's weights are the same without it.
        with torch.random.fork_rng(devices=[]):
            self.projection = MODELS.build(dict(
                dict(type='Projection'), **(projection or {}),
                in_channels=sum(widths), channels=channels))
            self.bank = MODELS.build(dict(
                bank, num_classes=num_classes, channels=channels,
                ignore_index=ignore_index))
        self.sampler = MODELS.build(sampler)
        self.mixing = None if mixing is None else MODELS.build(mixing)
        self.clock = Clock()
        self.keep_anchors = False
        self.last: list[dict[str, Tensor]] | None = None

    def init_weights(self) -> None:
        """As any module, with draws of its own."""
        with torch.random.fork_rng(devices=[]):
            super().init_weights()

    @property
    def needs_logits(self) -> bool:
        """Whether the sampler or a filter asks for predictions."""
        return self.sampler.needs_logits or self.correct_only

    def weight_at(self, iteration: int) -> float:
        """Weight of the loss: 0 before the start, then a linear ramp.

        Args:
            iteration (int): Steps before this one.
        """
        if iteration < self.start:
            return 0.
        if not self.ramp:
            return self.loss_weight
        return self.loss_weight * min(
            1., (iteration - self.start) / self.ramp)

    def project(self, features: Sequence[Tensor]) -> Tensor:
        """Embeddings of all positions.

        Args:
            features (Sequence[Tensor]): Outputs of backbone or neck; a
                single map for other ``features`` than 'backbone'.

        Returns:
            Tensor: ``(N, D, h, w)``; float32 or wider and of length 1 with
            ``normalize='all'``.
        """
        if self.features != 'backbone':
            (chosen, ) = features
        else:
            first, *others = (features[i] for i in self.in_index)
            chosen = torch.cat([first, *(
                F.interpolate(one, first.shape[2:], mode='bilinear',
                              align_corners=self.align_corners)
                for one in others)], 1) if others else first
        embeddings = self.projection(
            chosen.detach() if self.detach else chosen)
        return unit(embeddings) if self.normalize == 'all' else embeddings

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """See :meth:`project`."""
        return self.project(features)

    def zero(self) -> Tensor:
        """A loss of 0 that reaches every parameter of this head."""
        start = self.clock.count.new_zeros((), dtype=torch.float32)
        return sum((one.sum() * 0 for one in self.parameters()), start)

    def pixels(self,
               embeddings: Tensor,
               labels: Tensor,
               logits: Tensor | None = None,
               correct_only: bool = False,
               weights: Tensor | None = None,
               teacher: Tensor | None = None) -> Pixels:
        """All that is known of a batch, at the embeddings' resolution.

        Args:
            embeddings (Tensor): ``(B, D, h, w)``.
            labels (Tensor): int64, ``(B, H, W)``.
            logits (Tensor, optional): ``(B, C, h', w')``.
            correct_only (bool): Ignore pixels that the logits have wrong.
            weights (Tensor, optional): ``(B, H, W)``; the nearest is taken.
            teacher (Tensor, optional): See :class:`Pixels`.

        Returns:
            Pixels: At ``(h, w)``.
        """
        size = embeddings.shape[2:]
        labels = labels_at(labels, size, self.label_rule, self.num_classes,
                           self.min_ratio, self.ignore_index)
        if logits is not None:
            logits = logits.detach()
            if logits.shape[2:] != size:
                logits = F.interpolate(logits, size, mode='bilinear',
                                       align_corners=self.align_corners)
        if correct_only:
            assert logits is not None
            labels = labels.where(
                logits.argmax(1) == labels, self.ignore_index)
        if weights is not None:
            weights = F.interpolate(weights.unsqueeze(1), size).squeeze(1)
        return Pixels(embeddings, labels, logits, weights, teacher)

    def contrast(self,
                 anchors: Pixels,
                 generator: torch.Generator,
                 keys: Pixels | None = None) -> Tensor:
        """The loss, without its weight.

        Args:
            anchors (Pixels): Of which the sampler takes some.
            generator (torch.Generator): CPU generator for its draws.
            keys (Pixels, optional): For a BatchBank: all pixels of another
                view. None: the anchors themselves.

        Returns:
            Tensor: 0-d, float32 or wider.
        """
        chosen = self.sampler(
            anchors.labels, self.sampler.draw(anchors.labels, generator),
            anchors.logits, self.num_classes, self.ignore_index)
        vectors = _rows(anchors.embeddings)
        if not self.sampler.takes_all:
            vectors = vectors.index_select(0, chosen.index)
        if self.normalize == 'anchors':
            vectors = unit(vectors)
        more: dict[str, Any] = {}
        if anchors.weights is not None:
            more['anchor_weights'] = anchors.weights.flatten()[chosen.index]
        if anchors.teacher is not None:
            more['teacher'] = _rows(anchors.teacher)[chosen.index]
        if self.mixing is not None:
            more.update(mixing=self.mixing, draws=self.mixing.draw(
                len(vectors), generator, vectors.device))
        tile = getattr(self.bank, 'block_size', None)
        more.update(_places(anchors.labels, chosen.index, tile))
        if keys is not None:
            more.update(self._keys(keys, tile))
        loss = self.bank.loss(
            vectors, chosen.labels, self.tau, self.own, self.base_tau,
            self.reduce_positives, **more)
        if self.regularizer:
            mean, present = self.bank.centres()
            loss = loss + self.regularizer * contrast_regularizer(
                vectors, chosen.labels, mean, self.tau, present,
                self.ignore_index)
        if self.keep_anchors:
            self.last = [*(self.last or ()), dict(
                anchors=vectors.detach(), labels=chosen.labels)]
        return loss

    def _keys(self, keys: Pixels, tile: int | None) -> dict[str, Tensor]:
        """All pixels of another view, as a BatchBank takes them."""
        vectors, labels = _rows(keys.embeddings), keys.labels.flatten()
        every = torch.arange(len(labels), device=labels.device)
        found = dict(
            keys=unit(vectors) if self.normalize == 'anchors' else vectors,
            key_labels=labels)
        for name, value in _places(keys.labels, every, tile).items():
            found[f'key_{name}'] = value
        if keys.teacher is not None:
            found['key_teacher'] = _rows(keys.teacher)
        return found

    @torch.no_grad()
    def update_bank(self, pixels: Pixels, generator: torch.Generator) -> None:
        """Let the bank take in a batch; all ranks must.

        Args:
            pixels (Pixels): The batch.
            generator (torch.Generator): CPU generator, where a bank draws.
        """
        labels = pixels.labels.flatten()
        batch = len(pixels.labels)
        scores = None if not self.bank.draws else send(
            torch.rand(len(labels), generator=generator), labels.device)
        images = torch.arange(batch, device=labels.device).repeat_interleave(
            len(labels) // batch)
        self.bank.update(_rows(pixels.embeddings).detach(), labels, scores,
                         images, batch)

    def loss(self,
             inputs: Sequence[Tensor],
             batch_data_samples: list[SegDataSample],
             train_cfg: dict | None = None,
             decoder: Tensor | None = None,
             logits: Tensor | None = None) -> dict[str, Tensor]:
        """Supervised contrast, as a segmentor calls its auxiliary heads.

        Args:
            inputs (Sequence[Tensor]): Outputs of backbone or neck.
            batch_data_samples (list[SegDataSample]): With labels.
            train_cfg (dict, optional): Not used.
            decoder (Tensor, optional): What the decode head classifies.
            logits (Tensor, optional): The decode head's logits.

        Returns:
            dict[str, Tensor]: ``loss_contrast``.

        Raises:
            ValueError: If decoder or logits are needed and not given.
        """
        features = dict(backbone=inputs, decoder=[decoder],
                        logits=[logits])[self.features]
        if features[0] is None or self.needs_logits and logits is None:
            raise ValueError(
                f'ContrastHead with features = {self.features!r} and the '
                f'sampler {type(self.sampler).__name__} needs what the '
                "decode head classifies: set model.type = "
                "'ContrastEncoderDecoder', and a decode head that ends with "
                "mmseg's cls_seg")
        labels = torch.cat([
            sample.gt_sem_seg.data for sample in batch_data_samples]).long()
        iteration = self.clock.now()
        hub = MessageHub.get_current_instance()
        seed = hub.get_info('seed', None) or 0
        total = hub.get_info('max_iters', None)
        self.sampler.set_progress(min(1., iteration / total) if total else 0.)
        generator = generator_at(
            int(seed), get_rank(), iteration, 'ContrastHead', self.features)
        pixels = self.pixels(self.project(features), labels, logits,
                             self.correct_only)
        self.last = None
        if self.update == 'before':
            self.update_bank(pixels, generator)
        if iteration < self.start:
            value = pixels.embeddings.sum() * 0
        else:
            value = self.weight_at(iteration) * self.contrast(
                pixels, generator)
        if self.update == 'after':
            self.update_bank(pixels, generator)
        self.clock.tick()
        return dict(loss_contrast=value)


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value, )


def _rows(maps: Tensor) -> Tensor:
    """Maps ``(B, D, h, w)`` as one vector for each position."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _places(labels: Tensor, index: Tensor, block_size: int | None
            ) -> dict[str, Tensor]:
    """Numbers of the image and of the tile that each anchor lies in."""
    _, height, width = labels.shape
    images = index // (height * width)
    if block_size is None:
        return dict(images=images)
    across = -(-width // block_size)
    down = -(-height // block_size)
    row = index % (height * width) // width // block_size
    column = index % width // block_size
    return dict(images=images,
                blocks=(images * down + row) * across + column)
