"""Label ids checked and brought to the classes of the run."""

from __future__ import annotations

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class MapLabelIds(BaseTransform):
    """Look every label id up in a table; an id without entry is an error.

    Streams insert it right behind the transform that reads the label file,
    so all others see the run's classes.

    Args:
        table (sequence[int]): New id of each of the ids 0 to 255; -1 where
            an id must not occur.
        stream (str): Name of the stream, for the message.
        num_classes (int): Number of classes of the dataset, for the message.
    """

    def __init__(self, table: np.ndarray, stream: str,
                 num_classes: int) -> None:
        self.table = np.asarray(table, dtype=np.int16)
        self.stream = stream
        self.num_classes = num_classes
        if self.table.shape != (256, ):
            raise ValueError('table must have 256 entries, but has shape '
                             f'{self.table.shape}')

    def transform(self, results: dict) -> dict:
        """Map ``gt_seg_map``.

        Args:
            results (dict): Results with ``gt_seg_map`` ``(h, w)``.

        Returns:
            dict: The same results with mapped ids, uint8.

        Raises:
            ValueError: If an id has no entry; names the file and the id.
        """
        labels = results['gt_seg_map']
        self._check_shape(labels, results)
        if labels.dtype != np.uint8:
            outside = (labels < 0) | (labels > 255)
            if outside.any():
                self._refuse(int(labels[outside][0]), results)
            labels = labels.astype(np.uint8)
        mapped = self.table[labels]
        if mapped.size and mapped.min() < 0:
            self._refuse(int(labels[mapped < 0].min()), results)
        results['gt_seg_map'] = mapped.astype(np.uint8)
        return results

    def _check_shape(self, labels: np.ndarray, results: dict) -> None:
        """A label map of another size would be cut at other places."""
        path = results.get('seg_map_path', results.get('img_path'))
        if labels.ndim != 2:
            raise ValueError(
                f'stream {self.stream!r}: the label file {path} has the shape '
                f'{labels.shape}, but one class id per pixel is needed: '
                'convert colours to ids')
        # The image itself may have been resized before, as in test pipelines.
        size = results.get('ori_shape')
        if size is not None and tuple(size[:2]) != labels.shape:
            raise ValueError(
                f'stream {self.stream!r}: the label file {path} is '
                f'{labels.shape[1]} x {labels.shape[0]} pixels, but its image '
                f'is {size[1]} x {size[0]}')

    def _refuse(self, label: int, results: dict) -> None:
        path = results.get('seg_map_path', results.get('img_path'))
        raise ValueError(
            f'stream {self.stream!r}: the label file {path} holds the id '
            f'{label}, but its dataset has {self.num_classes} classes (ids 0 '
            f'to {self.num_classes - 1}, 255 is ignored): convert the labels '
            'to train ids, or check `classes` and `reduce_zero_label` of '
            f'`streams.{self.stream}.dataset`')

    def __repr__(self) -> str:
        """Short text: the entries that change something."""
        changes = {i: int(t) for i, t in enumerate(self.table) if t != i}
        inside = {i: t for i, t in changes.items() if t >= 0}
        return f'{type(self).__name__}({inside})'
