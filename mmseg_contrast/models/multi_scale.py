"""What a backbone gives for a whole image and for parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops.crop_box import Box


@dataclass(eq=False)
class MultiScale(Sequence):
    """Features of a coarse context and of fine details of the same images.

    As a sequence it is the context's stages: a head that knows nothing of
    details (an auxiliary head, a projection) sees the whole image at low
    resolution.

    Args:
        context (Sequence[Tensor]): Stages of the whole image at
            ``1 / factor`` of its size, ``(N, C_i, h_i, w_i)``.
        detail (Sequence[Sequence[Tensor]]): Stages of the boxes at full size,
            a chunk of boxes after the other, together
            ``(len(boxes) * N, C_i, h_i', w_i')``, all images of the first
            box first.
        boxes (tuple[Box, ...]): In pixels. In training one; else windows
            that cover the image.
        factor (int): Pixels of the image for one of the context, each way.
        divisor (int): Of which the edges of all boxes are multiples.
        size (tuple[int, int]): Height and width of the images.
        padded (tuple[int, int]): The same with the padding, to the right and
            below, that the features have seen.
    """

    context: Sequence[Tensor]
    detail: Sequence[Sequence[Tensor]]
    boxes: tuple[Box, ...]
    factor: int
    divisor: int
    size: tuple[int, int]
    padded: tuple[int, int]

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index):  # noqa: ANN001, ANN204
        return self.context[index]
