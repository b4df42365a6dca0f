"""The latest vectors of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from ..ops import (
    class_moments,
    gather_moments,
    gather_new,
    only_finite,
    push,
    top_scored,
)
from .keys import KeyBank


class ClassQueue(KeyBank):
    """A ring buffer of keys for each class.

    A place that has not been written is no key, neither zero nor random. A
    vector that is not finite, as it is stored, is left out.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        length (int): Keys kept of each class, L.
        energy (str): 'lse': each key is a negative by itself, as in
            ContrastiveSeg; 'mean': a class is one negative, its mean
            similarity, as in SePiCo's BankCL.
        dtype (str): What keys are stored as, 'float32' or 'float16'. Half
            the memory for an error of about 1e-5 of the energies of unit
            vectors at a temperature of 0.07; the loss is float32 anyway.
        chunk_size (int, optional): Anchors that are compared at a time, see
            :func:`mmseg_contrast.ops.class_contrast_loss`.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    keys: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 length: int = 5000,
                 energy: str = 'lse',
                 dtype: str = 'float32',
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(
            num_classes, channels, energy, chunk_size, ignore_index)
        self.check_positive(length=length)
        self.check_choice('dtype', dtype, 'float32', 'float16')
        self.length = length
        self.register_buffer('keys', torch.zeros(
            num_classes, length, channels, dtype=getattr(torch, dtype)))
        for name in ('pointer', 'filled'):
            self.register_buffer(
                name, torch.zeros(num_classes, dtype=torch.int64))

    def stored(self) -> tuple[Tensor, Tensor]:
        """See :meth:`.keys.KeyBank.stored`."""
        places = torch.arange(self.length, device=self.filled.device)
        return self.keys, places < self.filled.unsqueeze(1)

    def _append(self, new: Tensor, exists: Tensor) -> None:
        self._push(*gather_new(new.to(self.keys.dtype), exists))

    def _push(self, new: Tensor, exists: Tensor) -> None:
        new = new.to(self.keys.dtype)
        exists = only_finite(new, exists)
        push(self.keys, self.pointer, self.filled, new, exists)
        self.grow_older(exists.any(1))


@MODELS.register_module()
class PixelQueue(ClassQueue):
    """The latest drawn vectors of each class (ContrastiveSeg's pixel queue).

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        length (int): Keys kept of each class, L.
        number (int): Vectors of each class drawn in an update, at most.
        energy (str): See :class:`ClassQueue`.
        dtype (str): See there.
        chunk_size (int, optional): See there.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    draws = True

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 length: int = 5000,
                 number: int = 10,
                 energy: str = 'lse',
                 dtype: str = 'float32',
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, length, energy, dtype,
                         chunk_size, ignore_index)
        self.check_positive(number=number)
        self.number = number

    @torch.no_grad()
    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Append the vectors of each class that have the highest scores.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor, optional): Uniform numbers, ``(N,)``; they must
                be given.
            images (Tensor, optional): Not used.
            num_images (int): Not used.

        Raises:
            ValueError: If there are no scores.
        """
        if scores is None:
            raise ValueError('PixelQueue.update needs scores, one uniform '
                             'number for each vector, to draw with')
        index, exists = top_scored(
            labels, scores, self.num_classes, self.number, self.ignore_index)
        if not len(embeddings):
            embeddings = embeddings.new_zeros(1, self.channels)
        self._append(embeddings[index], exists)


@MODELS.register_module()
class SegmentQueue(ClassQueue):
    """The latest means of each class: of an image, or of a batch.

    ContrastiveSeg's segment queue has one for each image, scaled to length
    1; SePiCo's bank one for each batch, as it is.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        length (int): Keys kept of each class, L.
        segment (str): 'image', or 'batch': that of all ranks together.
        normalize (bool): Scale the means to length 1.
        energy (str): See :class:`ClassQueue`.
        dtype (str): See there.
        chunk_size (int, optional): See there.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 length: int = 5000,
                 segment: str = 'image',
                 normalize: bool = True,
                 energy: str = 'lse',
                 dtype: str = 'float32',
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, length, energy, dtype,
                         chunk_size, ignore_index)
        self.check_choice('segment', segment, 'image', 'batch')
        self.segment = segment
        self.normalize = normalize

    @torch.no_grad()
    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Append the mean vector of each class of each image, or of all.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor, optional): Not used.
            images (Tensor, optional): Number of each vector's image in the
                batch, int64 ``(N,)``; must be given with
                ``segment='image'``.
            num_images (int): Images of the batch, the same on all ranks.

        Raises:
            ValueError: If images are needed and not given.
        """
        known = self.known(labels)
        if self.segment == 'batch':
            images, num_images = torch.zeros_like(labels), 1
        elif images is None:
            raise ValueError(
                "SegmentQueue.update needs images, the number of each "
                "vector's image, with segment = 'image'")
        ids = (labels * num_images + images).where(
            known, labels.new_full((), -1))
        moments = class_moments(
            embeddings, ids, self.num_classes * num_images, ignore_index=-1)
        if self.segment == 'batch':
            moments = gather_moments(moments)
        new = moments[1].view(self.num_classes, num_images, -1)
        exists = moments[0].view(self.num_classes, num_images) > 0
        if self.normalize:
            new = F.normalize(new, dim=2)
        if self.segment == 'batch':  # gathered already
            self._push(new, exists)
        else:
            self._append(new, exists)
