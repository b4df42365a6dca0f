"""ContrastiveSeg's memory: pixels and segments together."""

from __future__ import annotations

import torch
from mmseg.registry import MODELS
from torch import Tensor

from ..ops import bank_energies, bank_positives, class_contrast_loss
from .bank import Bank
from .negatives import HardNegativeMixing
from .queues import PixelQueue, SegmentQueue


@MODELS.register_module()
class MemoryBank(Bank):
    """A queue of pixels and one of segments, as one set of keys.

    Wang et al., ICCV 2021: the keys of a class are the latest drawn pixels
    and the latest means of its segments, one for each image.

    Args:
        num_classes (int): Number of classes C.
        channels (int): Length of a vector D.
        pixels (int): Pixels kept of each class.
        segments (int): Segments kept of each class.
        number (int): Pixels of each class drawn in an update, at most.
        dtype (str): See :class:`.queues.ClassQueue`.
        chunk_size (int, optional): See there.
        ignore_index (int): Label that is ignored.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 pixels: int = 5000,
                 segments: int = 5000,
                 number: int = 10,
                 dtype: str = 'float32',
                 chunk_size: int | None = None,
                 ignore_index: int = 255) -> None:
        super().__init__(num_classes, channels, ignore_index)
        self.check_positive(pixels=pixels, segments=segments, number=number,
                            chunk_size=chunk_size or 1)
        self.chunk_size = chunk_size
        self.pixels = PixelQueue(
            num_classes, channels, pixels, number, dtype=dtype,
            ignore_index=ignore_index)
        self.segments = SegmentQueue(
            num_classes, channels, segments, dtype=dtype,
            ignore_index=ignore_index)

    @torch.no_grad()
    def update(self,
               embeddings: Tensor,
               labels: Tensor,
               scores: Tensor | None = None,
               images: Tensor | None = None,
               num_images: int = 1) -> None:
        """Append pixels and segments of a batch.

        Args:
            embeddings (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            scores (Tensor): Uniform numbers, ``(N,)``.
            images (Tensor): Number of each vector's image, int64 ``(N,)``.
            num_images (int): Images of the batch, the same on all ranks.

        Raises:
            ValueError: If scores or images are missing.
        """
        for queue in (self.pixels, self.segments):
            queue.update(embeddings, labels, scores, images, num_images)
        self.grow_older(self.segments.age == 0)

    def keys(self) -> tuple[Tensor, Tensor]:
        """All places ``(C, L, D)``, and which hold a key, bool ``(C, L)``."""
        queues = (self.pixels, self.segments)
        return (torch.cat([one.keys for one in queues], 1),
                torch.cat([one.occupied() for one in queues], 1))

    def entries(self) -> tuple[Tensor, Tensor]:
        """See :meth:`.bank.Bank.entries`."""
        vectors, labels = zip(
            self.pixels.entries(), self.segments.entries(), strict=True)
        return torch.cat(vectors), torch.cat(labels)

    def energies(self, anchors: Tensor, tau: float) -> Tensor:
        """Energy of each anchor with each class, ``(N, C)``.

        Args:
            anchors (Tensor): ``(N, D)``.
            tau (float): Temperature, > 0.
        """
        return bank_energies(anchors, *self.keys(), tau, 'lse')

    def positives(self, anchors: Tensor, labels: Tensor, tau: float
                  ) -> Tensor:
        """Similarities with all keys of the own class, ``(N, L)``.

        Args:
            anchors (Tensor): ``(N, D)``.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
        """
        return bank_positives(
            anchors, labels, *self.keys(), tau, self.ignore_index)

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
        """Contrast of anchors with all keys, see :meth:`.bank.Bank.loss`.

        Args:
            anchors (Tensor): ``(N, D)``, with gradients.
            labels (Tensor): int64, ``(N,)``.
            tau (float): Temperature, > 0.
            own (str): 'energy' or 'positive'.
            base_tau (float, optional): The loss is times ``tau / base_tau``.
            reduce_positives (str): 'mean' or 'lse'.
            anchor_weights (Tensor, optional): ``(N,)``.
            images (Tensor, optional): Not used.
            blocks (Tensor, optional): Not used.
            mixing (HardNegativeMixing, optional): See there.
            draws (Tensor, optional): See there.
            teacher (Tensor, optional): Not used.

        Returns:
            Tensor: 0-d.
        """
        return class_contrast_loss(
            anchors, labels, *self.keys(), tau, base_tau, own,
            reduce_positives, 'lse', anchor_weights,
            ignore_index=self.ignore_index, chunk_size=self.chunk_size,
            extra=self.mixed(anchors, labels, tau, mixing, draws))
