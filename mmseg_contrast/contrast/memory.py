"""ContrastiveSeg's memory: pixels and segments together."""

from __future__ import annotations

import torch
from mmseg.registry import MODELS
from torch import Tensor

from .keys import KeyBank
from .queues import PixelQueue, SegmentQueue


@MODELS.register_module()
class MemoryBank(KeyBank):
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
        super().__init__(num_classes, channels, chunk_size=chunk_size,
                         ignore_index=ignore_index)
        self.check_positive(pixels=pixels, segments=segments, number=number)
        self.pixels = PixelQueue(
            num_classes, channels, pixels, number, dtype=dtype,
            ignore_index=ignore_index)
        self.segments = SegmentQueue(
            num_classes, channels, segments, dtype=dtype,
            ignore_index=ignore_index)

    draws = True

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

    def stored(self) -> tuple[Tensor, Tensor]:
        """See :meth:`.keys.KeyBank.stored`."""
        keys, there = zip(
            self.pixels.stored(), self.segments.stored(), strict=True)
        return torch.cat(keys, 1), torch.cat(there, 1)
