"""Margins where pseudo-labels must not count, carried through the pipeline."""

from __future__ import annotations

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.structures import PixelData
from mmseg.datasets.transforms import PackSegInputs
from mmseg.registry import TRANSFORMS

FIELD = 'valid_region'


@TRANSFORMS.register_module()
class MarkValidRegion(BaseTransform):
    """Mark the pixels where a pseudo-label may count.

    Put it behind the loading transforms. The mark is a segmentation field,
    so resize, crop and flip carry it; padding counts as not valid. DAFormer
    leaves out the bonnet and the rectification artefacts of Cityscapes this
    way; HRDA made the mask a field of the sample.

    Args:
        top (int or float): Margin in pixels of the loaded image, or as a
            fraction of its height when a float in (0, 1).
        bottom (int or float): Likewise.
        left (int or float): Likewise, of the width.
        right (int or float): Likewise, of the width.

    Raises:
        ValueError: If a margin is negative or a float of 1 or more.
    """

    def __init__(self,
                 top: int | float = 0,
                 bottom: int | float = 0,
                 left: int | float = 0,
                 right: int | float = 0) -> None:
        self.margins = dict(top=top, bottom=bottom, left=left, right=right)
        for name, margin in self.margins.items():
            whole = float(margin).is_integer() and not (
                isinstance(margin, float) and margin > 0)
            if margin < 0 or not (whole or 0 < margin < 1):
                raise ValueError(
                    f'MarkValidRegion.{name} must be a number of pixels or a '
                    f'fraction in (0, 1), but is {margin}')

    def transform(self, results: dict) -> dict:
        """Add ``valid_region``, uint8 ``(h, w)``, to the fields.

        Args:
            results (dict): Results with a loaded ``img``.

        Returns:
            dict: The same results.

        Raises:
            ValueError: If the margins leave no pixel of the image.
        """
        height, width = results['img'].shape[:2]
        top, bottom = self._pixels(('top', 'bottom'), height)
        left, right = self._pixels(('left', 'right'), width)
        if top + bottom >= height or left + right >= width:
            raise ValueError(
                f'the margins {self.margins} of MarkValidRegion leave '
                f'nothing of the {width}x{height} image '
                f'{results.get("img_path")}')
        region = np.zeros((height, width), dtype=np.uint8)
        region[top:height - bottom, left:width - right] = 1
        results[FIELD] = region
        # a new list: the one of the dataset's own entry stays as it is
        results['seg_fields'] = [*results.get('seg_fields', []), FIELD]
        return results

    def _pixels(self, names: tuple[str, str], size: int) -> tuple[int, int]:
        first, second = (self.margins[n] for n in names)
        return (round(first * size) if 0 < first < 1 else int(first),
                round(second * size) if 0 < second < 1 else int(second))

    def __repr__(self) -> str:
        """Short text with the margins."""
        return f'{type(self).__name__}({self.margins})'


@TRANSFORMS.register_module()
class PadValidRegion(BaseTransform):
    """Pad ``valid_region`` with 0 to the size of the image.

    mmcv's ``Pad`` extends image and ``gt_seg_map`` at the bottom and the
    right, and no other field. Streams insert this behind every ``Pad``.
    """

    def transform(self, results: dict) -> dict:
        """Pad the field if there is one.

        Args:
            results (dict): Results with ``img`` of the final size.

        Returns:
            dict: The same results.
        """
        size = results['img'].shape[:2]
        if FIELD in results and results[FIELD].shape != size:
            results[FIELD] = mmcv.impad(results[FIELD], shape=size, pad_val=0)
        return results

    def __repr__(self) -> str:
        """The name."""
        return f'{type(self).__name__}()'


@TRANSFORMS.register_module()
class PackStreamInputs(PackSegInputs):
    """mmseg's packing, plus ``valid_region`` as ``PixelData``.

    Args:
        meta_keys (sequence[str]): See ``mmseg.PackSegInputs``.
    """

    def transform(self, results: dict) -> dict:
        """Pack image, labels and valid region.

        Args:
            results (dict): Results of the pipeline.

        Returns:
            dict: ``inputs`` (tensor ``(3, h, w)``) and ``data_samples``, with
                ``valid_region`` ``(1, h, w)`` uint8 where there is one.
        """
        packed = super().transform(results)
        if FIELD in results:
            region = PadValidRegion().transform(results)[FIELD]
            data = torch.from_numpy(np.ascontiguousarray(region))[None]
            packed['data_samples'].set_data(
                {FIELD: PixelData(data=data.to(torch.uint8))})
        return packed
