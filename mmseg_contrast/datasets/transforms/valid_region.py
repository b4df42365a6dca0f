"""Margins where pseudo-labels must not count, carried through the pipeline.

Padding and packing of the other fields of a stream as well.
"""

from __future__ import annotations

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.structures import PixelData
from mmseg.datasets.transforms import PackSegInputs
from mmseg.registry import TRANSFORMS

from .load_pseudo_labels import HARD_FIELD, SOFT_FIELD

FIELD = 'valid_region'
#: What padding is in each field that mmseg neither pads nor packs: no place
#: for a pseudo-label, and none.
PADDING = {FIELD: 0, HARD_FIELD: 255, SOFT_FIELD: 0}


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
    Pseudo-labels from files are padded with 255, soft ones with 0.
    """

    def transform(self, results: dict) -> dict:
        """Pad the fields that there are.

        Args:
            results (dict): Results with ``img`` of the final size.

        Returns:
            dict: The same results.
        """
        height, width = results['img'].shape[:2]
        for name, value in PADDING.items():
            field = results.get(name)
            if field is not None and field.shape[:2] != (height, width):
                grown = ((0, height - field.shape[0]),
                         (0, width - field.shape[1]), (0, 0))
                results[name] = np.pad(
                    field, grown[:field.ndim], constant_values=value)
        return results

    def __repr__(self) -> str:
        """The name."""
        return f'{type(self).__name__}()'


@TRANSFORMS.register_module()
class PackStreamInputs(PackSegInputs):
    """mmseg's packing, plus valid region and pseudo-labels as ``PixelData``.

    Args:
        meta_keys (sequence[str]): See ``mmseg.PackSegInputs``.
    """

    def transform(self, results: dict) -> dict:
        """Pack image, labels, valid region and pseudo-labels.

        Args:
            results (dict): Results of the pipeline.

        Returns:
            dict: ``inputs`` (tensor ``(3, h, w)``) and ``data_samples``, with
                ``valid_region`` and ``pseudo_label`` ``(1, h, w)`` and
                ``pseudo_probs`` ``(C, h, w)``, uint8, where they are.
        """
        packed = super().transform(results)
        padded = PadValidRegion().transform(results)
        for name in PADDING:
            if name in padded:
                data = torch.from_numpy(np.ascontiguousarray(padded[name]))
                data = data[None] if data.ndim == 2 else data.permute(2, 0, 1)
                packed['data_samples'].set_data({name: PixelData(
                    data=data.to(torch.uint8).contiguous())})
        return packed
