"""What all banks have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import (
    check_choice,
    class_moments,
    contrast_loss,
    known_labels,
    own_class,
    same_label,
    temperature_scale,
)
from .negatives import HardNegativeMixing


class Bank(nn.Module):
    """What is known of each class, for anchors to be compared with.

    Its state is in persistent buffers, so a run resumes with it, and is the
    same on all ranks: updates are merged across them, so that each rank must
    call :meth:`update`, also without a labelled vector. A class that is not
    in an update is not touched, nor one whose state an update would make
    infinite or NaN: a single such vector would stay in a mean for ever.
    Nothing waits for the device.

    ``age``, int64 ``(C,)``, is the number of updates since a class was last
    in one: 0 right after, -1 for a class that has not been seen. It is the
    same on all ranks, too. From a checkpoint without it, all classes that
    the bank knows start at 0.

    Args:
        num_classes (int): Number of classes C, >= 1.
        channels (int): Length of a vector D, >= 1.
        ignore_index (int): Label that is ignored, as ids outside ``[0, C)``.

    Raises:
        ValueError: If an argument is out of range.
    """

    #: Whether :meth:`update` draws vectors, and so needs scores.
    draws = False
    #: Whether updates change it; without, ``age`` stays -1 and isn't saved.
    remembers = True

    age: Tensor

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 ignore_index: int = 255) -> None:
        super().__init__()
        self.check_positive(num_classes=num_classes, channels=channels)
        self.num_classes = num_classes
        self.channels = channels
        self.ignore_index = ignore_index
        self.register_buffer(
            'age', torch.full((num_classes, ), -1, dtype=torch.int64),
            persistent=self.remembers)

    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Take in the vectors of a batch, without their gradients.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor, optional): Uniform numbers ``(N,)``, where a bank
                draws vectors: it takes those with the highest.
            images (Tensor, optional): Number of each vector's image in the
                batch, int64 ``(N,)``, where a bank tells them apart.
            num_images (int): Images of the batch, the same on all ranks.
        """
        raise NotImplementedError

    def entries(self) -> tuple[Tensor, Tensor]:
        """What anchors are compared with, one vector after the other.

        Returns:
            tuple: Vectors ``(M, D)``, detached, and the class of each, int64
            ``(M,)``, -1 for what does not exist.
        """
        raise NotImplementedError

    def centres(self) -> tuple[Tensor, Tensor]:
        """The mean vector of each class, as it is stored.

        Returns:
            tuple: ``(C, D)``, float32 or wider and without gradients, 0 for
            a class that does not exist, and bool ``(C,)``: which exist.
        """
        keys, labels = self.entries()
        count, mean, _ = class_moments(
            keys, labels, self.num_classes, ignore_index=-1)
        return mean, count > 0

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, C)``, minus infinity for classes not yet seen.
        """
        raise NotImplementedError

    def positives(self, anchors: Tensor, labels: Tensor, tau: float
                  ) -> Tensor:
        """Similarities of each anchor with its own class.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.

        Returns:
            Tensor: ``(N, P)``, minus infinity for what does not exist. One
            number here: the energy with the own class.
        """
        return own_class(
            self.energies(anchors, tau), labels, self.ignore_index)

    def energies_and_positives(self, anchors: Tensor, labels: Tensor,
                               tau: float) -> tuple[Tensor, Tensor]:
        """What both need is computed once.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.

        Returns:
            tuple: See :meth:`energies` and :meth:`positives`.
        """
        energies = self.energies(anchors, tau)
        if type(self).positives is not Bank.positives:
            return energies, self.positives(anchors, labels, tau)
        return energies, own_class(energies, labels, self.ignore_index)

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
             teacher: Tensor | None = None) -> Tensor:
        """Contrast of anchors with what the bank knows.

        All banks take the same arguments; images, blocks and teacher are
        for :class:`.batch.BatchBank` alone.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive', see
                :func:`mmseg_contrast.ops.contrast_loss`.
            base_tau (float, optional): The loss is times ``tau / base_tau``.
            reduce_positives (str): 'mean' or 'lse', see there.
            anchor_weights (Tensor, optional): ``(N,)``, see there.
            images (Tensor, optional): Number of each anchor's image in the
                batch, int64 ``(N,)``.
            blocks (Tensor, optional): Number of each anchor's tile, int64
                ``(N,)``; tiles of different images have different ones.
            mixing (HardNegativeMixing, optional): Adds synthetic negatives.
            draws (Tensor, optional): What ``mixing.draw`` gives.
            teacher (Tensor, optional): A teacher's embeddings of the
                anchors, ``(N, D')``.

        Returns:
            Tensor: 0-d; 0 with zero gradients where nothing counts.

        Raises:
            ValueError: If an argument is none of these.
        """
        scale = temperature_scale(tau, base_tau)
        return scale * contrast_loss(
            *self.energies_and_positives(anchors, labels, tau), labels, own,
            self.ignore_index, reduce_positives, anchor_weights,
            extra=self.mixed(anchors, labels, tau, mixing, draws))

    def mixed(self, anchors: Tensor, labels: Tensor, tau: float,
              mixing: HardNegativeMixing | None, draws: Tensor | None
              ) -> Tensor | None:
        """Energies of synthetic negatives, for ``contrast_loss(extra=)``.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            mixing (HardNegativeMixing, optional): Makes them. None: none.
            draws (Tensor, optional): For it.

        Returns:
            Tensor, optional: ``(N,)``.
        """
        if mixing is None:
            return None
        keys, key_labels = self.entries()
        rule = same_label(self.known_or_none(labels), key_labels, -1)
        return mixing(anchors, keys, rule, tau, draws)

    def grow_older(self, present: Tensor) -> None:
        """Count an update.

        Args:
            present (Tensor): Classes that were in it on any rank, bool,
                ``(C,)``.
        """
        older = self.age + (self.age >= 0)
        self.age.copy_(older.masked_fill(present, 0))

    def known(self, labels: Tensor) -> Tensor:
        """Which labels are those of a class, bool, of the same shape.

        Args:
            labels (Tensor): int64.
        """
        return known_labels(labels, self.num_classes, self.ignore_index)

    def known_or_none(self, labels: Tensor) -> Tensor:
        """Labels with -1 for those that are not of a class.

        Args:
            labels (Tensor): int64.
        """
        return labels.where(self.known(labels), labels.new_full((), -1))

    def check_positive(self, **sizes: int) -> None:
        """Refuse sizes below 1.

        Args:
            sizes (int): By the name of the argument.

        Raises:
            ValueError: Naming bank, argument and value.
        """
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f'{type(self).__name__}.{name} must be at '
                                 f'least 1, got {size}')

    def check_choice(self, name: str, value: str, *choices: str) -> None:
        """Refuse a value that is no choice.

        Args:
            name (str): The argument.
            value (str): Its value.
            choices (str): What it may be.

        Raises:
            ValueError: Naming bank, argument and choices.
        """
        check_choice(f'{type(self).__name__}.{name}', value, choices)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor],
                              prefix: str, *args: Any) -> None:
        # mmengine only logs shapes that differ, and a bank would start anew.
        mine = [*self.named_parameters(recurse=False),
                *self.named_buffers(recurse=False)]
        for name, tensor in mine:
            other = state_dict.get(prefix + name)
            if other is not None and other.shape != tensor.shape:
                raise ValueError(
                    f'{type(self).__name__} {prefix + name} has the shape '
                    f'{tuple(tensor.shape)}, in the checkpoint it has '
                    f'{tuple(other.shape)}: set the same numbers of classes, '
                    'channels and entries in the config, or load a '
                    'checkpoint without this bank')
        name = f'{prefix}age'
        without_age = self.remembers and name not in state_dict and any(
            prefix + other in state_dict for other, _ in mine)
        if without_age:  # saved before banks had one
            state_dict[name] = self.age
        super()._load_from_state_dict(state_dict, prefix, *args)
        if without_age:
            self.age.copy_(self.centres()[1].long() - 1)


def acceptable(added: Tensor, *states: Tensor) -> Tensor:
    """Which classes an update may touch: no NaN gets into a bank.

    Args:
        added (Tensor): Vectors of each in the batch, int64, of any shape.
        states (Tensor): What they would be, of this shape and one dimension
            more.

    Returns:
        Tensor: bool, of the shape of ``added``: those in the batch that
        would stay finite.
    """
    result = added > 0
    for state in states:
        result = result & state.isfinite().all(-1)
    return result


def new_share(clock: str, new_weight: float | None, count: Tensor,
              added: Tensor, dtype: torch.dtype) -> Tensor:
    """The share of a class's new statistics that is the batch's.

    Args:
        clock (str): 'cumulative': by numbers of vectors; 'ema':
            ``new_weight``; 'batch': 1. A class seen for the first time takes
            the batch's as they are.
        new_weight (float, optional): Weight of the batch with 'ema'.
        count (Tensor): Vectors of each class seen before, int64.
        added (Tensor): Vectors of each class in the batch, int64.
        dtype (torch.dtype): Of the result.

    Returns:
        Tensor: In [0, 1]; 0 for a class that is not in the batch.
    """
    if clock == 'cumulative':
        return added.to(dtype) / (count + added).clamp_min(1).to(dtype)
    present = (added > 0).to(dtype)
    if clock == 'batch':
        return present
    assert new_weight is not None
    return present.where(count == 0, present * new_weight)
