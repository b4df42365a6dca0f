"""Test-time augmentation for student and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn


@MODELS.register_module()
class UDATTAModel(SegTTAModel):
    """Averages the probabilities of all augmented copies.

    As ``SegTTAModel`` does it, for the student and, where the model gives
    ``teacher_seg_logits`` (``predict_with='both'``), for the teacher too. A
    plain segmentor works as well.
    """

    def merge_preds(
            self, data_samples_list: Sequence[Sequence[SegDataSample]]
    ) -> list[SegDataSample]:
        """Merge the predictions of every image.

        Args:
            data_samples_list (Sequence[Sequence[SegDataSample]]): For every
                image, its augmented copies with logits turned back to the
                image.

        Returns:
            list[SegDataSample]: One sample per image.
        """
        merged = []
        for copies in data_samples_list:
            # The last copy carries the result, as mmseg has it.
            sample = copies[-1]
            sample.set_data(dict(pred_sem_seg=PixelData(data=self._merge(
                [copy.seg_logits.data for copy in copies]))))
            if 'teacher_seg_logits' in sample:
                sample.set_data(
                    dict(teacher_pred_sem_seg=PixelData(data=self._merge(
                        [copy.teacher_seg_logits.data for copy in copies]))))
            if 'gt_sem_seg' in copies[0]:
                sample.set_data(dict(gt_sem_seg=copies[0].gt_sem_seg))
            if 'img_path' in copies[0]:
                sample.set_metainfo(dict(img_path=copies[0].img_path))
            merged.append(sample)
        return merged

    def _merge(self, logits: list[Tensor]) -> Tensor:
        """Class of the mean probability, ``(1, H, W)``."""
        student: Any = getattr(self.module, 'segmentor', self.module)
        if student.out_channels > 1:
            probs = torch.stack([one.softmax(dim=0) for one in logits])
            return probs.mean(dim=0).argmax(dim=0, keepdim=True)
        probs = torch.stack([one.sigmoid() for one in logits]).mean(dim=0)
        head = student.decode_head
        if isinstance(head, nn.ModuleList):  # a cascade decides at its end
            head = head[-1]
        return (probs > head.threshold).to(probs)
