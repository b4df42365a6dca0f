"""Supervised contrast of what the decode head classifies."""

from __future__ import annotations

from typing import Any

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .classifier_input import classifier_input
from .contrast_head import ContrastHead
from .slide import BatchedSlide


class ContrastLoss:
    """Mixin: contrast heads also see the decode head, before EncoderDecoder.

    A :class:`.ContrastHead` among the auxiliary heads may then ask for the
    features before the classifier or for predictions (ContrastiveSeg's hard
    anchors). In adaptation the objective ``Contrast`` does this for any
    segmentor.
    """

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict:
        """All losses of a batch, see mmseg's EncoderDecoder.

        Args:
            inputs (Tensor): Images, ``(N, 3, H, W)``.
            data_samples (list[SegDataSample]): With labels.

        Returns:
            dict[str, Tensor]: By mmseg's names.
        """
        net: Any = self
        features = net.extract_feat(inputs)
        with classifier_input(net.decode_head) as seen:
            losses = net._decode_head_forward_train(features, data_samples)
        heads = net.auxiliary_head if net.with_auxiliary_head else []
        alone = not isinstance(heads, (list, nn.ModuleList))
        for i, head in enumerate([heads] if alone else heads):
            more = dict(decoder=seen.features, logits=seen.logits) if (
                isinstance(head, ContrastHead)) else {}
            prefix = 'aux' if alone else f'aux_{i}'
            for key, value in head.loss(
                    features, data_samples, net.train_cfg, **more).items():
                losses[f'{prefix}.{key}'] = value
        return losses


@MODELS.register_module()
class ContrastEncoderDecoder(ContrastLoss, BatchedSlide, EncoderDecoder):
    """An EncoderDecoder whose contrast heads also see the decode head.

    Any stock config becomes one by ``model.type = 'ContrastEncoderDecoder'``;
    its weights have the same names. HRDASegmentor does the same.
    """
