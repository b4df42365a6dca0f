"""mmseg's IoU for any predicted field of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from .subsets import ClassSubset, class_ids, read_subsets


@METRICS.register_module()
class FieldIoUMetric(IoUMetric):
    """``IoUMetric`` on a chosen field, with the IoU of every class.

    With ``predict_with='both'`` a sample carries the student's prediction and
    the teacher's::

        val_evaluator = [
            dict(type='FieldIoUMetric'),
            dict(type='FieldIoUMetric', field='teacher_pred_sem_seg',
                 prefix='teacher')]

    A subset's result is the mean of the IoUs that the confusion of *all*
    classes gives: a pixel of the subset that is predicted as a class outside
    of it is an error, and so is the reverse. This is how SYNTHIA's 16 and 13
    classes are reported: of 19-class IoUs, three of them 0, the mean times
    19/16 is the mean over 16, but only as long as they are 0. As in ``mIoU``,
    a class that is in neither labels nor predictions doesn't count
    (``nan_to_num`` gives it a value); without any such class the mean is nan.

    Args:
        field (str): Field of the sample that holds the prediction.
        per_class (bool): Whether the results hold ``IoU.<class>`` in percent;
            a class that is in neither labels nor predictions is left out.
        class_subsets (Mapping, optional): Further mean IoUs by the name of
            the result; of each the classes, as a list of names or ids, or
            'synthia16' or 'synthia13'. With ``mIoU`` in their names
            ``save_best`` knows that more is better.
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
        ValueError: If a sample lacks the field or labels, or if a subset
            doesn't fit the dataset (before training starts).
    """

    def __init__(self,
                 field: str = 'pred_sem_seg',
                 per_class: bool = True,
                 class_subsets: Mapping[str, ClassSubset] | None = None,
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
        self._subsets = read_subsets(class_subsets)
        self._subset_ids: dict[str, list[int]] = {}

    @property
    def dataset_meta(self) -> dict | None:
        """What the dataset says of itself, its classes among it."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        # Loops set this when they are built, which is before training.
        self._subset_ids = {
            name: class_ids(name, members, dataset_meta['classes'])
            for name, members in self._subsets.items()}
        self._dataset_meta = dataset_meta

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
            if not self.format_only and 'gt_sem_seg' not in sample:
                raise ValueError(
                    f'{sample.get("img_path", "A sample")} has no labels to '
                    'compare with: set FieldIoUMetric(format_only=True), or '
                    'use SubmissionMetric, in the evaluator of a dataset '
                    'without labels.')
        super().process(data_batch, [
            {**sample, 'pred_sem_seg': sample[self.field]}
            for sample in data_samples])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """All of mmseg's results, means of subsets, IoU of every class.

        Args:
            results (list): Areas of every image.

        Returns:
            dict[str, float]: Percentages, rounded to two digits.
        """
        metrics = super().compute_metrics(results)
        if self.format_only or not (self.per_class or self._subset_ids):
            return metrics
        intersect, union, predicted, labelled = (
            sum(areas) for areas in zip(*results, strict=True))
        values = self.total_area_to_metrics(
            intersect, union, predicted, labelled, ['mIoU'])['IoU']
        for name, ids in self._subset_ids.items():
            metrics[name] = self._mean(values[ids])
        if self.per_class:
            classes = (self.dataset_meta or {})['classes']
            for name, value in zip(classes, values, strict=True):
                if not np.isnan(value):
                    metrics[f'IoU.{name}'] = round(float(value) * 100, 2)
        return metrics

    def _mean(self, values: np.ndarray) -> float:
        """Mean in percent over the classes that are there."""
        if self.nan_to_num is not None:
            values = np.nan_to_num(values, nan=self.nan_to_num)
        values = values[~np.isnan(values)]
        # np.nanmean would warn of a subset without any class.
        return round(float(values.mean()) * 100, 2) if len(values) else np.nan
