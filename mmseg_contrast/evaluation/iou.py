"""mmseg's IoU for any predicted field of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS


@METRICS.register_module()
class FieldIoUMetric(IoUMetric):
    """``IoUMetric`` on a chosen field, with the IoU of every class.

    With ``predict_with='both'`` a sample carries the student's prediction and
    the teacher's::

        val_evaluator = [
            dict(type='FieldIoUMetric'),
            dict(type='FieldIoUMetric', field='teacher_pred_sem_seg',
                 prefix='teacher')]

    Args:
        field (str): Field of the sample that holds the prediction.
        per_class (bool): Whether the results hold ``IoU.<class>`` in percent;
            a class that is in neither labels nor predictions is left out.
        prefix (str, optional): Put before the names of the results.
        ignore_index (int): Label that doesn't count.
        iou_metrics (Sequence[str] or str): Of mIoU, mDice, mFscore.
        nan_to_num (int, optional): Replaces nan in the means.
        beta (int): Weight of recall in the F-score.
        collect_device (str): 'cpu' or 'gpu', where ranks meet.
        output_dir (str, optional): Where predictions are written as PNG.
        format_only (bool): Only write predictions.
        keep_results (bool): Set by mmseg's ``tools/test.py --out``; results
            are always kept.

    Raises:
        ValueError: If a sample lacks the field.
    """

    def __init__(self,
                 field: str = 'pred_sem_seg',
                 per_class: bool = True,
                 prefix: str | None = None,
                 ignore_index: int = 255,
                 iou_metrics: Sequence[str] | str = ('mIoU', ),
                 nan_to_num: int | None = None,
                 beta: int = 1,
                 collect_device: str = 'cpu',
                 output_dir: str | None = None,
                 format_only: bool = False,
                 keep_results: bool = True) -> None:
        if not isinstance(iou_metrics, str):
            iou_metrics = list(iou_metrics)
        super().__init__(
            ignore_index=ignore_index,
            iou_metrics=iou_metrics,
            nan_to_num=nan_to_num,
            beta=beta,
            collect_device=collect_device,
            output_dir=output_dir,
            format_only=format_only,
            prefix=prefix)
        self.field = field
        self.per_class = per_class

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the pixels of one batch.

        Args:
            data_batch (dict): Unused.
            data_samples (Sequence[dict]): Samples as dicts.
        """
        for sample in data_samples:
            if self.field not in sample:
                raise ValueError(
                    f'The predictions have no field {self.field!r}, which '
                    "FieldIoUMetric(field=...) reads; set model.predict_with="
                    "'both' for the teacher's, or remove the metric from "
                    'val_evaluator and test_evaluator.')
        super().process(data_batch, [
            {**sample, 'pred_sem_seg': sample[self.field]}
            for sample in data_samples])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """All of mmseg's results, and the IoU of every class.

        Args:
            results (list): Areas of every image.

        Returns:
            dict[str, float]: Percentages, rounded to two digits.
        """
        metrics = super().compute_metrics(results)
        if self.format_only or not self.per_class:
            return metrics
        intersect, union, predicted, labelled = (
            sum(areas) for areas in zip(*results, strict=True))
        values = self.total_area_to_metrics(
            intersect, union, predicted, labelled, ['mIoU'])['IoU']
        for name, value in zip(
                self.dataset_meta['classes'], values, strict=True):
            if not np.isnan(value):
                metrics[f'IoU.{name}'] = round(float(value) * 100, 2)
        return metrics
