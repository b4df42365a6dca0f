"""Sliding-window inference, several windows in one pass.

mmseg forwards one window at a time. With ``batched`` in a segmentor's
``test_cfg`` up to that many windows go through it together::

    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(256, 256),
                  batched=8)

The key only says how much is done at once, not what is computed. Code that
does not know it, such as MMSegmentation's own tools, gets the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from ..ops import slide_boxes, slide_windows


def windows_per_pass(test_cfg: Mapping[str, Any] | None,
                     where: str = 'model.test_cfg') -> int | None:
    """How many windows go through the net together.

    Args:
        test_cfg (dict, optional): Of a segmentor.
        where (str): Its place in the config, for messages.

    Returns:
        int, optional: The number; None if ``batched`` isn't set.

    Raises:
        ValueError: If ``batched`` is no number of windows, or if the windows
            it asks for can't be.
    """
    batched = (test_cfg or {}).get('batched')
    if test_cfg is None or batched is None:
        return None
    # True is an int as well; it would be one window at a time.
    if not isinstance(batched, int) or isinstance(batched, bool) or (
            batched < 1):
        raise ValueError(
            f'{where}.batched must be the largest number of windows in one '
            f'pass, a whole number from 1 on, got {batched!r}.')
    if test_cfg.get('mode') != 'slide':
        return batched
    for key in ('crop_size', 'stride'):
        pair = test_cfg.get(key)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(
                isinstance(side, int) and side > 0 for side in pair):
            raise ValueError(
                f'{where}.{key} must be a height and a width in pixels, got '
                f'{pair!r}.')
    for length, step in zip(
            test_cfg['crop_size'], test_cfg['stride'], strict=True):
        if step > length:
            raise ValueError(
                f"{where}.stride = {test_cfg['stride']} is larger than "
                f"crop_size = {test_cfg['crop_size']}: the windows would "
                'leave pixels out.')
    return batched


def slide_inference(segmentor: nn.Module, inputs: Tensor,
                    batch_img_metas: list[dict]) -> Tensor:
    """As mmseg's slide_inference, ``test_cfg.batched`` windows at a time.

    Args:
        segmentor (nn.Module): With ``test_cfg`` and ``encode_decode``.
        inputs (Tensor): Images, ``(N, 3, H, W)``.
        batch_img_metas (list[dict]): Of each image; they stay as they are.

    Returns:
        Tensor: Logits, float32 at least, ``(N, C, H, W)``.

    Raises:
        ValueError: If ``test_cfg`` doesn't say how to slide.
    """
    cfg = segmentor.test_cfg
    limit = windows_per_pass(cfg)
    if limit is None:
        raise ValueError('model.test_cfg.batched is not set.')
    height, width = inputs.shape[-2:]
    boxes = slide_boxes(height, width, tuple(cfg['crop_size']),
                        tuple(cfg['stride']))
    top, bottom, left, right = boxes[0]
    # That it is a torch.Size tells mmseg's heads that they see a window;
    # others take the size of their output from one of the other keys.
    size = torch.Size((bottom - top, right - left))
    metas = [dict(one, img_shape=size, pad_shape=size, batch_input_shape=size)
             for one in batch_img_metas]
    return slide_windows(
        lambda windows, images: segmentor.encode_decode(
            windows, [dict(metas[image]) for image in images]),
        inputs, boxes, limit)


class BatchedSlide:
    """Mixin for segmentors of our own, before ``EncoderDecoder``."""

    def slide_inference(self, inputs: Tensor,
                        batch_img_metas: list[dict]) -> Tensor:
        """Logits of sliding windows, ``(N, C, H, W)``.

        Args:
            inputs (Tensor): Images, ``(N, 3, H, W)``.
            batch_img_metas (list[dict]): Of each image.
        """
        segmentor: Any = self
        if windows_per_pass(segmentor.test_cfg) is None:
            return super().slide_inference(  # type: ignore[misc]
                inputs, batch_img_metas)
        return slide_inference(segmentor, inputs, batch_img_metas)


@contextmanager
def batched_slide(model: Any) -> Iterator[None]:
    """Inside the block, segmentors with ``test_cfg.batched`` obey it.

    A built segmentor of any class is what we get, and its ``predict`` calls
    its ``slide_inference``. For the time of the block this is replaced on the
    instance: no class of mmseg is changed, the segmentor keeps its type (a
    checkpoint, a message and a pickle say the same as ever), and its own
    ``predict`` is what runs. Copies made inside of the block slide with
    themselves. A class with a ``slide_inference`` of its own keeps that.

    Args:
        model (nn.Module): A segmentor, or a model that has some in it, such
            as one for test-time augmentation. Something that is no module
            (the config of a model that is yet to be built) is left alone.

    Raises:
        ValueError: If a segmentor's ``test_cfg.batched`` is wrong.
    """
    if isinstance(model, EncoderDecoder):
        found = [model]
    elif isinstance(model, nn.Module):
        found = [one for one in model.modules()
                 if isinstance(one, EncoderDecoder)]
    else:
        found = []
    changed = [
        one for one in found
        if windows_per_pass(one.test_cfg) is not None
        and type(one).slide_inference is EncoderDecoder.slide_inference
        and 'slide_inference' not in vars(one)]  # an outer block's
    for one in changed:
        # A bound method, as its deep copy belongs to the copy.
        one.slide_inference = MethodType(slide_inference, one)
    try:
        yield
    finally:
        for one in changed:
            del one.slide_inference
