"""Preprocessing of several streams by the student's own preprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor
from mmengine.structures import BaseDataElement, PixelData
from mmseg.registry import MODELS
from torch import nn

from ..ops import send

#: Of a preprocessor: swaps blue and red. onedl's name, and mmseg 1.2's.
_SWAPS = ('_channel_conversion', 'channel_conversion')


@MODELS.register_module()
class DomainDataPreprocessor(BaseDataPreprocessor):
    """Runs the student's preprocessor on each stream.

    A batch of one stream, as validation and test give, passes straight
    through.

    Args:
        base (dict or nn.Module): The student's preprocessor.
    """

    def __init__(self, base: dict | nn.Module) -> None:
        super().__init__()
        self.base = base if isinstance(base, nn.Module) else MODELS.build(
            base)

    def forward(self, data: dict, training: bool = False) -> dict[str, Any]:
        """Normalise, pad and stack.

        Args:
            data (dict): ``inputs`` and ``data_samples``, each a list, or a
                dict of lists by stream.
            training (bool): As mmseg's preprocessors take it.

        Returns:
            dict: The same with ``inputs`` as ``(N, 3, H, W)``, by stream if
            they came by stream.
        """
        if not isinstance(data['inputs'], dict):
            return self.base(data, training)
        inputs, samples = {}, {}
        for name, images in data['inputs'].items():
            one = self._stream(_flat(images),
                               _flat(data['data_samples'][name]), training)
            inputs[name], samples[name] = one['inputs'], one['data_samples']
        return dict(inputs=inputs, data_samples=samples)

    def _stream(self, images: list, samples: list, training: bool) -> dict:
        sizes = [tuple(image.shape[-2:]) for image in images]
        images, samples = (
            [_sent(one, self.device) for one in some]
            for some in (images, samples))
        with _without_swap(self.base) as swap:
            if swap and len(images[0]) == 3:
                images = [image.flip(0) for image in images]
            done = self.base(
                dict(inputs=images, data_samples=samples), training)
        height, width = done['inputs'].shape[-2:]
        given = ['valid_region' in sample for sample in done['data_samples']]
        padded = any(size != (height, width) for size in sizes)
        if not (any(given) or padded):
            return done
        for sample, (high, wide), has in zip(
                done['data_samples'], sizes, given, strict=True):
            # mmseg pads images and labels alone, to the right and below; a
            # pixel of padding is no place for a pseudo-label.
            if has:
                region = sample.valid_region.data
            else:
                region = torch.ones(
                    1, high, wide, dtype=torch.uint8,
                    device=done['inputs'].device)
            region = F.pad(region, (0, width - wide, 0, height - high))
            sample.set_data(dict(valid_region=PixelData(data=region)))
        return done


def _sent(value: Any, device: torch.device) -> Any:
    """A tensor, or all tensors of a sample, on the device."""
    if isinstance(value, torch.Tensor):
        return send(value, device)
    if not isinstance(value, BaseDataElement):
        return value
    moved = value.new()
    for key, one in value.items():
        moved.set_data({key: _sent(one, device)})
    return moved


@contextmanager
def _without_swap(base: nn.Module) -> Iterator[bool]:
    """Leave the order of the channels alone; says whether it is changed.

    mmseg picks channels by a list, for which the host waits on each image.
    """
    key = next((key for key in _SWAPS if getattr(base, key, False)), None)
    if key is None:
        yield False
        return
    setattr(base, key, False)
    try:
        yield True
    finally:
        setattr(base, key, True)


def _flat(batch: list) -> list:
    """Streams with several images a position come as lists of lists."""
    if batch and isinstance(batch[0], (list, tuple)):
        return list(chain.from_iterable(batch))
    return list(batch)
