"""Keys of the current batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_gather, get_rank, get_world_size
from mmseg.registry import MODELS
from torch import Tensor

from ..ops import (
    except_self,
    pair_contrast_loss,
    place_weights,
    same_label,
    same_label_across_images,
    same_pair,
    teacher_topk,
    within,
)
from ..ops.pair_relation import PairRule
from .bank import Bank
from .negatives import HardNegativeMixing

SCOPES = ('batch', 'image', 'positives_across_images', 'block')
RULES = ('same_label', 'same_pair', 'teacher_topk')


@MODELS.register_module()
class BatchBank(Bank):
    """The vectors of the batch itself, with their gradients.

    It has no state: keys are given with the anchors, or are the anchors, of
    which each is then compared with all others (ContrastiveSeg without a
    memory, CLUDA, supervised contrast).

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        scope (str): Which pairs there are by label. 'batch': all; 'image':
            those of the same image; 'positives_across_images': positives of
            all images, negatives of the anchor's own (Zhao et al., ICCV
            2021); 'block': those of the same tile. The loss is then the mean
            over all tiles with an anchor (Hu et al., MICCAI 2021).
        block_size (int, optional): For 'block': side of a tile in positions
            of the feature map, for those who number the tiles. Published: 32.
        skip_classes (Sequence[int]): Classes that are keys but no anchors;
            for Hu et al. the background, ``(0,)``.
        rule (str): What a positive is. 'same_label'; 'same_pair': of the
            same image, while other images of the same label are left out
            (Chaitanya et al., 2020, where a label is the place of a slice
            in its volume); 'teacher_topk': the keys that a teacher finds
            most similar (ReKD, Zheng et al., 2022). See
            :mod:`mmseg_contrast.ops.pair_relation`.
        k (int, optional): Positives of each anchor by 'teacher_topk'.
        gather (bool): Compare with the keys of all ranks, which must give as
            many. Only this rank's get a gradient here.
        chunk_size (int, optional): Anchors that are compared at a time, see
            :func:`mmseg_contrast.ops.pair_contrast_loss`.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range, or has no effect.
    """

    remembers = False

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 scope: str = 'batch',
                 block_size: int | None = None,
                 skip_classes: Sequence[int] = (),
                 rule: str = 'same_label',
                 k: int | None = None,
                 gather: bool = False,
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_choice('scope', scope, *SCOPES)
        self.check_choice('rule', rule, *RULES)
        self.check_positive(chunk_size=chunk_size or 1)
        if rule != 'same_label' and scope != 'batch':
            raise ValueError(f'BatchBank.rule = {rule!r} is for all pairs: '
                             "set scope = 'batch'")
        if gather and scope in ('image', 'block'):
            raise ValueError(
                f'BatchBank.gather brings no pair with scope = {scope!r}: '
                'leave it out')
        for name, value, needed in (
                ('block_size', block_size, scope == 'block'),
                ('k', k, rule == 'teacher_topk')):
            if needed != (value is not None) or needed and (
                    value or 0) < 1:
                raise ValueError(
                    f"BatchBank.{name} must be at least 1 with scope = "
                    "'block' (block_size) or rule = 'teacher_topk' (k), and "
                    f'is left out otherwise, got {value}')
        self.scope = scope
        self.block_size = block_size
        self.skip_classes = tuple(skip_classes)
        self.rule = rule
        self.k = k
        self.gather = gather
        self.chunk_size = chunk_size

    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Nothing: there is nothing to remember.

        Args:
            embeddings (Tensor): Not used.
            labels (Tensor): Not used.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Not used.
            num_images (int): Not used.
        """

    def entries(self) -> tuple[Tensor, Tensor]:
        """Nothing: ``(0, D)`` and ``(0,)``."""
        return (torch.zeros(0, self.channels, device=self.age.device),
                self.age[:0])

    def loss(self,
             anchors: Tensor,
             labels: Tensor,
             tau: float,
             own: str,
             base_tau: float | None = None,
             reduce_positives: str = 'mean',
             anchor_weights: Tensor | None = None,
             images: Tensor | None = None,
             blocks: Tensor | None = None,
             mixing: HardNegativeMixing | None = None,
             draws: Tensor | None = None,
             teacher: Tensor | None = None,
             keys: Tensor | None = None,
             key_labels: Tensor | None = None,
             key_weights: Tensor | None = None,
             key_images: Tensor | None = None,
             key_blocks: Tensor | None = None,
             key_teacher: Tensor | None = None) -> Tensor:
        """Contrast of anchors with keys, see :meth:`.bank.Bank.loss`.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive'.
            base_tau (float, optional): The loss is times ``tau / base_tau``.
            reduce_positives (str): 'mean' or 'lse'.
            anchor_weights (Tensor, optional): a, ``(N,)`` or ``(N, R)``.
            images (Tensor, optional): Number of each anchor's image, int64
                ``(N,)``; for scopes of images and the rule 'same_pair'.
            blocks (Tensor, optional): Number of each anchor's tile, int64
                ``(N,)``, other ones in other images; for 'block'.
            mixing (HardNegativeMixing, optional): Adds synthetic negatives.
            draws (Tensor, optional): What ``mixing.draw`` gives.
            teacher (Tensor, optional): A teacher's embeddings of the
                anchors, ``(N, D')``; for 'teacher_topk'.
            keys (Tensor, optional): ``(M, D)``. None: all other anchors.
            key_labels (Tensor, optional): int64, ``(M,)``; with the keys.
            key_weights (Tensor, optional): b, ``(M,)`` or ``(M, R)``; a
                pair's weight is ``a_i b_j``, see
                :mod:`mmseg_contrast.ops.pair_weights`.
            key_images (Tensor, optional): As ``images``, with the keys.
            key_blocks (Tensor, optional): As ``blocks``, with the keys.
            key_teacher (Tensor, optional): As ``teacher``, with the keys.

        Returns:
            Tensor: 0-d.

        Raises:
            ValueError: If only one of keys and their labels is given, or
                scope or rule lack something.
        """
        if (keys is None) != (key_labels is None):
            raise ValueError(
                'BatchBank.loss takes keys and key_labels, or neither')
        alone = keys is None
        if keys is None or key_labels is None:
            keys, key_labels = anchors, labels
            key_images, key_blocks = images, blocks
            key_teacher = teacher
        labels = self._as_anchors(labels)
        key_labels = self.known_or_none(key_labels)
        if self.gather:
            keys = with_other_ranks(keys)
            key_labels = with_other_ranks(key_labels)
            if key_weights is not None:
                key_weights = with_other_ranks(key_weights)
            if key_teacher is not None:
                key_teacher = with_other_ranks(key_teacher)
            if key_images is not None:
                key_images = with_other_ranks(key_images, other=-1)
        rule = self._pairs(
            labels, key_labels, (images, key_images), (blocks, key_blocks),
            (teacher, key_teacher), alone)
        if self.scope == 'block':
            assert blocks is not None and key_blocks is not None
            each = place_weights(
                labels, blocks, key_labels, key_blocks, alone,
                torch.promote_types(anchors.dtype, torch.float32))
            anchor_weights = each if anchor_weights is None else (
                each.view(-1, *[1] * (anchor_weights.dim() - 1))
                * anchor_weights)
        extra = None if mixing is None else mixing(
            anchors, keys, except_self(rule) if alone else rule, tau, draws)
        return pair_contrast_loss(
            anchors, keys, rule, tau, base_tau, own, reduce_positives, alone,
            anchor_weights, key_weights, self.chunk_size, extra)

    def _as_anchors(self, labels: Tensor) -> Tensor:
        """Labels with -1 for what is no anchor."""
        labels = self.known_or_none(labels)
        for skipped in self.skip_classes:
            labels = labels.masked_fill(labels == skipped, -1)
        return labels

    def _pairs(self, labels: Tensor, key_labels: Tensor,
               images: tuple[Tensor | None, Tensor | None],
               blocks: tuple[Tensor | None, Tensor | None],
               teacher: tuple[Tensor | None, Tensor | None],
               alone: bool) -> PairRule:
        if self.rule == 'teacher_topk':
            assert self.k is not None
            return teacher_topk(
                *self._given('teacher', *teacher), self.k, labels,
                key_labels, alone, ignore_index=-1)
        if self.rule == 'same_pair':
            return same_pair(*self._given('images', *images), labels,
                             key_labels, ignore_index=-1)
        if self.scope == 'positives_across_images':
            here, there = self._given('images', *images)
            return same_label_across_images(
                labels, here, key_labels, there, ignore_index=-1)
        rule = same_label(labels, key_labels, ignore_index=-1)
        if self.scope == 'image':
            rule = within(rule, *self._given('images', *images))
        if self.scope == 'block':
            rule = within(rule, *self._given('blocks', *blocks))
        return rule

    def _given(self, name: str, one: Tensor | None, keys: Tensor | None
               ) -> tuple[Tensor, Tensor]:
        if one is None or keys is None:
            raise ValueError(
                f'BatchBank.loss with scope = {self.scope!r} and rule = '
                f'{self.rule!r} needs {name} of the anchors, and key_{name} '
                'if there are keys')
        return one, keys


def with_other_ranks(mine: Tensor, other: int | None = None) -> Tensor:
    """This rank's rows, with their gradients, then those of all others.

    One collective, which all ranks must enter with as many rows.

    Args:
        mine (Tensor): ``(M, ...)``.
        other (int, optional): What stands for the others' values, where
            these mean something on their own rank only.

    Returns:
        Tensor: ``(M R, ...)`` on R ranks.
    """
    ranks = get_world_size()
    if ranks == 1:
        return mine
    if other is not None:
        return torch.cat([mine, torch.full_like(mine, other).repeat(
            ranks - 1, *[1] * (mine.dim() - 1))])
    every = all_gather(mine.detach().contiguous())
    del every[get_rank()]
    return torch.cat([mine, *every])
