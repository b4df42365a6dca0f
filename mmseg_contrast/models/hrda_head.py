"""HRDA's decoder: one head at two scales, fused by an attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.structures import PixelData
from mmseg.models.decode_heads.cascade_decode_head import (
    BaseCascadeDecodeHead,
)
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import (
    box_size,
    crop_to_box,
    fuse_detail,
    merge_windows,
    scale_box,
)
from ..ops.crop_box import AnyBox
from .classifier_input import Seen, classifier_input
from .multi_scale import MultiScale

#: SegFormer's decoder with 256 channels: the published attention.
ATTENTION = dict(
    type='DAFormerHead', channels=256, embed_dims=256,
    fusion=dict(type='ConvFusion'))
#: What the attention's config takes from the head where it is silent.
_INHERITED = ('in_index', 'dropout_ratio', 'norm_cfg', 'act_cfg',
              'align_corners')


@dataclass
class ScaleLogits:
    """All logits of one pass.

    Args:
        fused (Tensor): At the detail's resolution, ``(N, C, h, w)``.
        context (Tensor): Of the whole image at low resolution, as the head
            gives them: no attention in them.
        detail (Tensor): Of the box; without a box of the whole image, merged
            from windows.
        attention (Tensor): In [0, 1], ``(N, C or 1, h', w')``, the context's
            size; not masked by the box.
        box (AnyBox, optional): The detail's, in pixels. None: all of the
            image.
        context_features (Tensor, optional): What was classified in the
            context, before dropout; None if the head does not end with
            mmseg's cls_seg.
        detail_features (Tensor, optional): The same of the detail; None
            without a box.
    """

    fused: Tensor
    context: Tensor
    detail: Tensor
    attention: Tensor
    box: AnyBox | None
    context_features: Tensor | None
    detail_features: Tensor | None


@MODELS.register_module()
class HRDAHead(BaseModule):
    r"""One head for context and detail (Hoyer et al., ECCV 2022).

    An attention, predicted from the context, says for each class where the
    detail is trusted (:func:`mmseg_contrast.ops.fuse_detail`). The loss is

    .. math:: (1 - \lambda_d - \lambda_c) L(fused) + \lambda_d L(detail)
        + \lambda_c L(context)

    with the labels and weights inside the box for the detail. Batch norms of
    the head see the context first, then the detail.

    Names of weights are the published ones: ``head.*`` and
    ``scale_attention.*``.

    Args:
        head (dict): Any head of mmseg with one map of logits, such as
            ``dict(type='DAFormerHead', ...)`` or ``SegformerHead``.
        attention (dict or float): A head whose logits are the attention.
            Without a type, DAFormerHead with 256 channels and a 1 x 1
            fusion, with these keys changed. Stages, dropout, norm and
            activation are the head's where it is silent. A number in [0, 1]
            is an attention that is the same everywhere: 0 is the context
            alone, 1 the detail alone.
        classwise (bool): One attention for each class, or one for all.
        detail_weight (float): lambda_d, in [0, 1].
        context_weight (float): lambda_c. On the context's own logits; the
            published code would take those that the attention has reduced,
            with 0.
        init_cfg (dict, optional): Not used; both heads have their own.

    Raises:
        ValueError: If the head gives more than one map, if a number is out
            of range, or the attention neither a number nor a dict.
    """

    def __init__(self,
                 head: dict,
                 attention: dict | float = ATTENTION,
                 classwise: bool = True,
                 detail_weight: float = 0.1,
                 context_weight: float = 0.,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        if min(detail_weight, context_weight) < 0 or (
                detail_weight + context_weight > 1):
            raise ValueError(
                'HRDAHead.detail_weight and context_weight must be >= 0 and '
                f'at most 1 together, got {detail_weight} and '
                f'{context_weight}.')
        self.head = MODELS.build(head)
        _check_plain(self.head)
        # Heads change theirs with input_transform='resize_concat'.
        self.stage_channels = head['in_channels']
        self.detail_weight = detail_weight
        self.context_weight = context_weight
        self.fixed_attention: float | None = None
        if isinstance(attention, (int, float)):
            if not 0 <= attention <= 1:
                raise ValueError('HRDAHead.attention, as a number, must lie '
                                 f'in [0, 1], got {attention}.')
            self.fixed_attention = float(attention)
        elif isinstance(attention, Mapping):
            self.scale_attention = self.companion(attention, classwise)
        else:
            raise ValueError(
                'HRDAHead.attention must be a dict, such as '
                'dict(channels=256), or a number in [0, 1], got '
                f'{attention!r}.')
        self.num_classes = self.head.num_classes
        self.out_channels = self.head.out_channels
        self.threshold = self.head.threshold
        self.align_corners = self.head.align_corners
        self.ignore_index = self.head.ignore_index
        #: Who looks at what is classified, see :func:`.classifier_input`.
        self.watchers: list[Seen] = []

    @property
    def loss_decode(self) -> nn.Module:
        """Losses of the inner head."""
        return self.head.loss_decode

    @property
    def sampler(self) -> Any:
        """Pixel sampler of the inner head, see mmseg."""
        return self.head.sampler

    def companion(self, config: Mapping, classwise: bool = False) -> nn.Module:
        """Another head on the same stages, such as the attention.

        Args:
            config (dict): Of a head, completed from this one's: see the
                argument ``attention``.
            classwise (bool): Whether it has a logit for each class, or one.

        Returns:
            nn.Module: The head.
        """
        config = dict(config) if 'type' in config else {
            **ATTENTION, **config}
        inherited = {key: getattr(self.head, key) for key in _INHERITED}
        inherited['in_channels'] = self.stage_channels
        if config['type'] == 'DAFormerHead':
            for key in ('in_channels', 'in_index'):
                if isinstance(inherited[key], int):
                    inherited[key] = [inherited[key]]
        channels = dict(num_classes=1, out_channels=1, threshold=0.5)
        if classwise:
            channels = {key: getattr(self.head, key) for key in channels}
        return MODELS.build({**inherited, **config, **channels})

    def look(self, stages: Sequence[Tensor]) -> Seen:
        """Decode the context.

        Args:
            stages (Sequence[Tensor]): Its stages.

        Returns:
            Seen: What was classified (None if the head does not end with
            mmseg's cls_seg), and the logits.
        """
        with classifier_input(self.head) as seen:
            logits = self.head(stages)
        return Seen(seen.features, logits)

    def attend(self, features: Sequence[Tensor], context: Tensor) -> Tensor:
        """How much the detail is trusted.

        Args:
            features (Sequence[Tensor]): Stages of the context.
            context (Tensor): Its logits, ``(N, C, h, w)``.

        Returns:
            Tensor: In [0, 1], ``(N, C or 1, h, w)``.
        """
        size = context.shape[-2:]
        if self.fixed_attention is not None:
            return context.new_full(
                (len(context), 1, *size), self.fixed_attention)
        attention = self.scale_attention(features).sigmoid()
        if attention.shape[-2:] != size:
            attention = F.interpolate(
                attention, size, mode='bilinear',
                align_corners=self.align_corners)
        return attention

    def scales(self, features: MultiScale) -> ScaleLogits:
        """All logits of one pass.

        Args:
            features (MultiScale): Of context and detail.

        Raises:
            ValueError: If the features are of another segmentor, or the
                boxes no whole cells of the logits.
        """
        if not isinstance(features, MultiScale):
            raise ValueError(
                'HRDAHead decodes two resolutions: set the type of the '
                "segmentor that it is the decode head of to 'HRDASegmentor'.")
        seen = features.seen or self.look(features.context)
        context = seen.logits
        assert context is not None
        attention = self.attend(features.context, context)
        with classifier_input(self.head) as closer:
            detail = self._detail(features.detail)
        stride = _stride(features, detail)
        box = features.box
        if box is None:
            detail = self._merged(detail, features, stride)
        fused = fuse_detail(
            context, detail, attention,
            None if box is None else scale_box(box, stride),
            features.factor, self.align_corners)
        for watcher in self.watchers:
            watcher.features, watcher.logits = seen.features, fused
        return ScaleLogits(
            fused, context, detail, attention, box, seen.features,
            None if box is None else closer.features)

    def _merged(self, detail: Tensor, features: MultiScale, stride: int
                ) -> Tensor:
        """Logits of the whole image from those of windows."""
        boxes = [scale_box(box, stride) for box in features.windows]
        height, width = (side // stride for side in features.padded)
        return merge_windows(
            detail.unflatten(0, (len(boxes), -1)), boxes, (height, width))

    def _detail(self, chunks: Sequence[Sequence[Tensor]]) -> Tensor:
        """Logits of all boxes; in one pass where a norm sees the batch."""
        if len(chunks) > 1 and any(
                isinstance(part, _BatchNorm) and part.training
                for part in self.head.modules()):
            chunks = [[torch.cat(stage)
                       for stage in zip(*chunks, strict=True)]]
        logits = [self.head(chunk) for chunk in chunks]
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def forward(self, inputs: MultiScale) -> Tensor:
        """Fused logits, ``(N, C, h, w)``.

        Args:
            inputs (MultiScale): Of context and detail.
        """
        return self.scales(inputs).fused

    def weighted_parts(self, outputs: ScaleLogits
                       ) -> list[tuple[str, float, Tensor, AnyBox | None]]:
        """What is learnt from: prefix of the log, weight, logits, box.

        Args:
            outputs (ScaleLogits): Of one pass.
        """
        parts = [
            ('', 1 - self.detail_weight - self.context_weight, outputs.fused,
             None),
            ('hr.', self.detail_weight, outputs.detail, outputs.box),
            ('lr.', self.context_weight, outputs.context, None)]
        return [part for part in parts if not part[0] or part[1]]

    def loss(self,
             inputs: MultiScale,
             batch_data_samples: list[SegDataSample],
             train_cfg: dict | None = None) -> dict[str, Tensor]:
        """Losses of fused logits, detail and context.

        Args:
            inputs (MultiScale): Of context and detail.
            batch_data_samples (list[SegDataSample]): With labels.
            train_cfg (dict, optional): Not used.

        Returns:
            dict[str, Tensor]: By mmseg's names, those of the detail after
            ``hr.``, of the context after ``lr.``; losses have their weights.
        """
        losses = {}
        for prefix, weight, logits, box in self.weighted_parts(
                self.scales(inputs)):
            samples = batch_data_samples if box is None else [
                SegDataSample(gt_sem_seg=PixelData(data=crop_to_box(
                    sample.gt_sem_seg.data, box)))
                for sample in batch_data_samples]
            for key, value in self.head.loss_by_feat(logits, samples).items():
                losses[prefix + key] = (
                    value * weight if 'loss' in key else value)
        return losses

    def predict(self,
                inputs: MultiScale,
                batch_img_metas: list[dict],
                test_cfg: dict | None = None) -> Tensor:
        """Fused logits at the images' resolution.

        Args:
            inputs (MultiScale): Of context and detail.
            batch_img_metas (list[dict]): Their metas, see mmseg.
            test_cfg (dict, optional): Not used.

        Returns:
            Tensor: ``(N, C, H, W)``.
        """
        logits = self(inputs)
        if inputs.padded != inputs.size:
            logits = F.interpolate(
                logits, inputs.padded, mode='bilinear',
                align_corners=self.align_corners)
            height, width = inputs.size
            logits = logits[..., :height, :width]
        return self.head.predict_by_feat(logits, batch_img_metas)


def _check_plain(head: nn.Module) -> None:
    """Refuse a head that is trained on more than one map of logits."""
    kind = type(head)
    if not isinstance(head, BaseDecodeHead) or isinstance(
            head, BaseCascadeDecodeHead) or (
            kind.loss is not BaseDecodeHead.loss) or (
            kind.loss_by_feat is not BaseDecodeHead.loss_by_feat):
        raise ValueError(
            f'HRDAHead.head.type = {kind.__name__} gives more than one map of '
            'logits in training, or trains in its own way; use a head with '
            'one map, such as DAFormerHead, SegformerHead or UPerHead.')


def _stride(features: MultiScale, detail: Tensor) -> int:
    """Pixels for each cell of the detail's logits."""
    high, wide = box_size(features.box or features.windows[0])
    height, width = detail.shape[-2:]
    stride = high // height
    if (high, wide) != (height * stride, width * stride):
        raise ValueError(
            f'the head of HRDAHead gives {height} x {width} logits for '
            f'{high} x {wide} pixels: that is no whole '
            'number of pixels for each; use another HRDASegmentor.'
            'detail_size, or a head with another stride.')
    coarse = stride * features.factor
    if features.divisor % coarse:
        raise ValueError(
            f'HRDASegmentor.divisor = {features.divisor}, but each logit of '
            f'the context covers {coarse} pixels of the image: set '
            f'divisor={coarse}.')
    return stride
