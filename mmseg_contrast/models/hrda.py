"""HRDA: a coarse look at the whole image, a fine one at parts of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import crop_to_box, draw_crop_box, slide_boxes, unsure_box
from ..ops.crop_box import Box
from .contrast_segmentor import ContrastLoss
from .multi_scale import MultiScale
from .slide import BatchedSlide

#: Where the detail can be taken in training.
DETAILS = ('random', 'unsure')
#: Outputs of the backbone and of the neck.
_BothStages = tuple[Sequence[Tensor], Sequence[Tensor]]


@MODELS.register_module()
class HRDASegmentor(ContrastLoss, BatchedSlide, EncoderDecoder):
    """An EncoderDecoder at two resolutions (Hoyer et al., ECCV 2022).

    In training, the context is the image at half its size, the detail a crop
    at full size, at one random place for the batch. In evaluation the detail
    is a window that slides over the image. Around any backbone of mmseg;
    the decode head is a :class:`.HRDAHead` around any head with one map of
    logits::

        model = dict(
            type='HRDASegmentor',
            backbone=dict(...),
            decode_head=dict(type='HRDAHead', head=dict(...)),
            detail_size=(512, 512))

    Context and detail of one size go through the backbone in one call, unless
    a batch norm in it would see both.

    Args:
        backbone (dict): Any backbone.
        decode_head (dict): An HRDAHead.
        neck (dict, optional): Any neck.
        auxiliary_head (dict or list, optional): Heads on the context.
        train_cfg (dict, optional): As in EncoderDecoder.
        test_cfg (dict, optional): As in EncoderDecoder. With mode='slide'
            each crop has its own context, as published.
        data_preprocessor (dict, optional): As in EncoderDecoder.
        pretrained (str, optional): As in EncoderDecoder.
        init_cfg (dict, optional): As in EncoderDecoder.
        detail_size (Sequence[int]): Height and width of the detail, multiples
            of ``divisor``.
        factor (int): Pixels of the image for one of the context, each way.
        divisor (int): Grid of the detail's offsets, in pixels: a multiple of
            the pixels that each logit of the context covers, 8 for logits at
            a quarter of the resolution. Sides of training crops are
            multiples of it; in evaluation images are padded to it.
        include_last (bool): Whether the detail can reach the lower and the
            right border; the published code never draws the last offset.
        overlap (bool): Whether windows are half a window apart (published,
            9 for an image of twice the detail's size), or side by side (4).
        max_windows (int): Windows, counted over the batch, in one call of
            backbone and head in evaluation: a bound on memory. Contexts
            count too where they go with the first windows; where there is no
            room they go before them, all at once. So does everything where a
            batch norm sees the batch.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 backbone: dict,
                 decode_head: dict,
                 neck: dict | None = None,
                 auxiliary_head: dict | list | None = None,
                 train_cfg: dict | None = None,
                 test_cfg: dict | None = None,
                 data_preprocessor: dict | None = None,
                 pretrained: str | None = None,
                 init_cfg: dict | None = None,
                 detail_size: Sequence[int] = (512, 512),
                 factor: int = 2,
                 divisor: int = 8,
                 include_last: bool = True,
                 overlap: bool = True,
                 max_windows: int = 32) -> None:
        super().__init__(
            backbone=backbone, decode_head=decode_head, neck=neck,
            auxiliary_head=auxiliary_head, train_cfg=train_cfg,
            test_cfg=test_cfg, data_preprocessor=data_preprocessor,
            pretrained=pretrained, init_cfg=init_cfg)
        if not hasattr(self.decode_head, 'scales'):
            raise ValueError(
                'HRDASegmentor.decode_head.type = '
                f'{type(self.decode_head).__name__} is no HRDAHead: put it '
                "into one, decode_head=dict(type='HRDAHead', head=...).")
        for key, value in (('factor', factor), ('divisor', divisor),
                           ('max_windows', max_windows)):
            if value < 1:
                raise ValueError(
                    f'HRDASegmentor.{key} must be at least 1, got {value}.')
        if not isinstance(detail_size, Sequence) or len(detail_size) != 2 or (
                min(detail_size) < 1) or any(
                    side % divisor for side in detail_size):
            raise ValueError(
                'HRDASegmentor.detail_size must be a height and a width, '
                f'multiples of divisor = {divisor}, got {detail_size}.')
        self.detail_size = (int(detail_size[0]), int(detail_size[1]))
        self.factor = factor
        self.divisor = divisor
        self.include_last = include_last
        self.overlap = overlap
        self.max_windows = max_windows
        self._norms: list[nn.Module] | None = None

    def draw_box(self, height: int, width: int,
                 generator: torch.Generator | None = None) -> Box:
        """The place of the detail, one for the batch.

        Args:
            height (int): Height of the images.
            width (int): Width of the images.
            generator (torch.Generator, optional): CPU generator. None:
                torch's own, as dropout.

        Returns:
            Box: top, bottom, left, right, multiples of ``divisor``.
        """
        vertical, horizontal = torch.rand(2, generator=generator).tolist()
        return draw_crop_box(
            height, width, self.detail_size, (vertical, horizontal),
            self.divisor, self.include_last)

    def windows(self, height: int, width: int) -> list[Box]:
        """The windows that cover an image, row by row.

        Args:
            height (int): Height of the image, a multiple of ``divisor``.
            width (int): Its width, the same.
        """
        high, wide = self.detail_size
        if self.overlap:
            # Half a window, on the grid.
            grid = self.divisor
            high, wide = (max(side // 2 // grid, 1) * grid
                          for side in (high, wide))
        return slide_boxes(height, width, self.detail_size, (high, wide))

    def context(self, images: Tensor) -> Tensor:
        """The images as the context sees them.

        Args:
            images (Tensor): ``(N, 3, H, W)``.

        Returns:
            Tensor: ``(N, 3, H // factor, W // factor)``.
        """
        size = tuple(side // self.factor for side in images.shape[-2:])
        return F.interpolate(
            images, size, mode='bilinear', align_corners=False)

    def multi_scale(self, images: Tensor,
                    generator: torch.Generator | None = None,
                    detail: str = 'random'
                    ) -> tuple[MultiScale, MultiScale]:
        """Features of context and detail.

        Args:
            images (Tensor): ``(N, 3, H, W)``.
            generator (torch.Generator, optional): For :meth:`draw_box`.
            detail (str): Where the detail of a training crop is: at one
                place for the batch, as :meth:`draw_box` says; or, 'unsure',
                in that one of :meth:`windows` where the context's
                prediction has the highest mean entropy, for each image
                (CLUDA). The backbone then runs twice, since the context
                comes first.

        Returns:
            tuple: What the backbone gives, and what the heads get; the same
            without a neck.

        Raises:
            ValueError: If a training crop is no multiple of ``divisor``, or
                smaller than the detail, or ``detail`` is unknown.
        """
        if detail not in DETAILS:
            raise ValueError(f'detail must be one of {DETAILS}, got '
                             f'{detail!r}.')
        height, width = size = tuple(images.shape[-2:])
        below, right = -height % self.divisor, -width % self.divisor
        if not self.training:
            images = F.pad(images, (0, right, 0, below))
            boxes = self.windows(*images.shape[-2:])
        elif below or right:
            raise ValueError(
                'HRDASegmentor needs training crops whose sides are multiples '
                f'of divisor = {self.divisor}, got {height} x {width}; '
                'change crop_size.')
        elif detail == 'unsure':
            return self._where_unsure(images)
        else:
            boxes = [self.draw_box(height, width, generator)]
        crops = torch.cat([crop_to_box(images, box) for box in boxes])
        context, chunks = self._encode(self.context(images), crops)
        padded = tuple(images.shape[-2:])
        before, after = (MultiScale(
            context[i], [chunk[i] for chunk in chunks], tuple(boxes),
            self.factor, self.divisor, size, padded) for i in range(2))
        return before, after

    def _where_unsure(self, images: Tensor) -> tuple[MultiScale, MultiScale]:
        """The same in training, with the detail where the context says."""
        size = tuple(images.shape[-2:])
        context = self._stages(self.context(images))
        seen = self.decode_head.look(context[1])
        box = unsure_box(seen.logits, self.windows(*size),
                         size[0] // seen.logits.shape[-2])
        detail = self._stages(crop_to_box(images, box))
        before, after = (MultiScale(
            context[i], [detail[i]], box, self.factor, self.divisor, size,
            size, looked) for i, looked in enumerate((None, seen)))
        return before, after

    def _encode(self, context: Tensor, crops: Tensor
                ) -> tuple[_BothStages, list[_BothStages]]:
        """Stages of the context and of the crops, in as few calls as exact."""
        number = len(context)
        sees_batch = self._sees_batch()
        limit = (number + len(crops) if self.training or sees_batch
                 else self.max_windows)
        joint = (not sees_batch and number < limit
                 and context.shape[-2:] == crops.shape[-2:])
        first = min(limit - number if joint else limit, len(crops))
        if joint:
            both = self._stages(torch.cat([context, crops[:first]]))
            low, high = (_rows(both, part) for part in (
                slice(number), slice(number, None)))
        else:
            low, high = self._stages(context), self._stages(crops[:first])
        return low, [high, *(
            self._stages(crops[start:start + limit])
            for start in range(first, len(crops), limit))]

    def _stages(self, images: Tensor) -> _BothStages:
        """What the backbone gives, and the neck."""
        stages = self.backbone(images)
        return stages, self.neck(stages) if self.with_neck else stages

    def _sees_batch(self) -> bool:
        """Whether a norm before the heads uses statistics of the batch."""
        if self._norms is None:
            # Not in the constructor: Runner replaces SyncBN after it.
            parts = [self.backbone, *([self.neck] if self.with_neck else [])]
            self._norms = [one for part in parts for one in part.modules()
                           if isinstance(one, _BatchNorm)]
        return any(norm.training for norm in self._norms)

    def extract_feat(self, inputs: Tensor) -> MultiScale:
        """What the heads get.

        Args:
            inputs (Tensor): Images, ``(N, 3, H, W)``.
        """
        return self.multi_scale(inputs)[1]

    def _forward(self, inputs: Tensor,
                 data_samples: list[SegDataSample] | None = None) -> Tensor:
        return self.decode_head(self.extract_feat(inputs))


def _rows(stages: _BothStages, part: slice) -> _BothStages:
    """Some samples of all stages."""
    before, after = stages
    return [one[part] for one in before], [one[part] for one in after]
