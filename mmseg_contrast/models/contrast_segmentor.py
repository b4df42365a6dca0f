"""Supervised contrast of what the decode head classifies."""

from __future__ import annotations

from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .classifier_input import classifier_input
from .contrast_head import ContrastHead
from .slide import BatchedSlide


@MODELS.register_module()
class ContrastEncoderDecoder(BatchedSlide, EncoderDecoder):
    """An EncoderDecoder whose contrast heads also see the decode head.

    Any stock config becomes one by ``model.type = 'ContrastEncoderDecoder'``;
    its weights have the same names. A :class:`.ContrastHead` among its
    auxiliary heads may then ask for the features before the classifier or
    for predictions (ContrastiveSeg's hard anchors). In adaptation the
    objective ``Contrast`` does this for any segmentor.
    """

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict:
        """All losses of a batch, see mmseg's EncoderDecoder.

        Args:
            inputs (Tensor): Images, ``(N, 3, H, W)``.
            data_samples (list[SegDataSample]): With labels.

        Returns:
            dict[str, Tensor]: By mmseg's names.
        """
        features = self.extract_feat(inputs)
        with classifier_input(self.decode_head) as seen:
            losses = self._decode_head_forward_train(features, data_samples)
        heads = self.auxiliary_head if self.with_auxiliary_head else []
        alone = not isinstance(heads, (list, nn.ModuleList))
        for i, head in enumerate([heads] if alone else heads):
            more = dict(decoder=seen.features, logits=seen.logits) if (
                isinstance(head, ContrastHead)) else {}
            prefix = 'aux' if alone else f'aux_{i}'
            for key, value in head.loss(
                    features, data_samples, self.train_cfg, **more).items():
                losses[f'{prefix}.{key}'] = value
        return losses
