"""What a backbone gives for a whole image and for parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops.crop_box import AnyBox, Box, BoxOfEach
from .classifier_input import Seen


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
        boxes (tuple[Box, ...] or BoxOfEach): In pixels. In training one, or
            one of each image; else windows that cover the image.
        factor (int): Pixels of the image for one of the context, each way.
        divisor (int): Of which the edges of all boxes are multiples.
        size (tuple[int, int]): Height and width of the images.
        padded (tuple[int, int]): The same with the padding, to the right and
            below, that the features have seen.
        seen (Seen, optional): The context, decoded already: what was
            classified, and its logits.
    """

    context: Sequence[Tensor]
    detail: Sequence[Sequence[Tensor]]
    boxes: tuple[Box, ...] | BoxOfEach
    factor: int
    divisor: int
    size: tuple[int, int]
    padded: tuple[int, int]
    seen: Seen | None = None

    @property
    def box(self) -> AnyBox | None:
        """The detail's; None if it is windows that cover the image."""
        if isinstance(self.boxes, BoxOfEach):
            return self.boxes
        return self.boxes[0] if len(self.boxes) == 1 else None

    @property
    def windows(self) -> tuple[Box, ...]:
        """The windows that cover the image; one box is one as well."""
        assert not isinstance(self.boxes, BoxOfEach)
        return self.boxes

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index):  # noqa: ANN001, ANN204
        return self.context[index]
