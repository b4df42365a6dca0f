"""A view: one batch of images seen in one way, and what is known of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class View:
    """A batch of images of one domain, with labels, weights and provenance.

    Streams of the loader are views; view modules make others from them
    (ClassMix, strong augmentation, masks).

    Args:
        name (str): Name under which the step knows this view.
        images (Tensor): Normalised images, float, ``(N, 3, H, W)``.
        domain (str): Name of the stream the pixels come from, or of both,
            joined by ``+``.
        labels (Tensor, optional): Class ids, int64, ``(N, H, W)``; 255 is
            ignored.
        probs (Tensor, optional): Soft labels, float, ``(N, C, H, W)``.
        weights (Tensor, optional): Loss weight of every pixel, float32,
            ``(N, H, W)``, >= 0. None means 1 everywhere.
        weight_parts (tuple, optional): The same weights as a short sum
            ``sum_k scale_k * mask_k`` of ``(scale, mask)`` pairs, scale a
            0-d tensor or ``(N,)``, mask bool ``(N, H, W)``, masks disjoint.
            Losses that take no pixel weight need it.
        valid (Tensor, optional): Pixels where a pseudo-label may count, bool,
            ``(N, H, W)`` (margins and padding are False). None: everywhere.
        metas (list[dict]): Metainfo of every sample.
        extras (dict[str, Tensor]): Maps that travel with the crop, such as
            ``origin`` (bool ``(N, H, W)``, True where a mixed pixel comes
            from the source).
        inputs (dict): Further keywords for the backbone.
        detail (str): Where a student of two resolutions takes its detail,
            see :meth:`.HRDASegmentor.multi_scale`.
    """

    name: str
    images: Tensor
    domain: str
    labels: Tensor | None = None
    probs: Tensor | None = None
    weights: Tensor | None = None
    weight_parts: tuple[tuple[Tensor, Tensor], ...] | None = None
    valid: Tensor | None = None
    metas: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    detail: str = 'random'

    def replace(self, **changes: Any) -> View:
        """A copy with some fields changed (tensors are shared)."""
        return dataclasses.replace(self, **changes)
