"""GTA5, SYNTHIA and ACDC, with the 19 classes of Cityscapes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.datasets import BaseSegDataset, CityscapesDataset
from mmseg.registry import DATASETS

from .conversion import PAIR_LIST

_CONDITIONS = ('fog', 'night', 'rain', 'snow')
_SPLITS = ('train', 'val', 'test')


class RenderedDataset(BaseSegDataset):
    """Images and converted labels in two flat folders.

    Args:
        ann_file (str, optional): List of stems, one per line, below
            ``data_root``. None: ``pairs.txt`` if it lies in ``data_root``,
            else every image. An empty string: every image.
        img_suffix (str): End of the names of images.
        seg_map_suffix (str): End of the names of label files.
        metainfo (dict, optional): See ``mmseg.BaseSegDataset``.
        data_root (str, optional): Folder of the data set.
        data_prefix (dict, optional): ``img_path`` and ``seg_map_path``. None:
            the folders of the release.
        pipeline (list): Transforms.
        test_mode (bool): See ``mmengine.BaseDataset``.
        indices (int or list[int], optional): A subset.
        serialize_data (bool): See ``mmengine.BaseDataset``.
        lazy_init (bool): See ``mmengine.BaseDataset``.
        max_refetch (int): See ``mmengine.BaseDataset``.
        backend_args (dict, optional): See ``mmseg.BaseSegDataset``.

    Raises:
        ValueError: If the folder of the images is missing or empty.
    """

    METAINFO = CityscapesDataset.METAINFO
    FOLDERS: Mapping[str, str] = {}

    def __init__(self,
                 ann_file: str | None = None,
                 img_suffix: str = '.png',
                 seg_map_suffix: str = '_labelTrainIds.png',
                 metainfo: dict | None = None,
                 data_root: str | None = None,
                 data_prefix: dict | None = None,
                 pipeline: list | tuple = (),
                 test_mode: bool = False,
                 indices: Any = None,
                 serialize_data: bool = True,
                 lazy_init: bool = False,
                 max_refetch: int = 1000,
                 backend_args: dict | None = None) -> None:
        if ann_file is None:
            listed = os.path.isfile(os.path.join(data_root or '', PAIR_LIST))
            ann_file = PAIR_LIST if listed else ''
        super().__init__(
            ann_file=ann_file,
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=dict(
                self.FOLDERS if data_prefix is None else data_prefix),
            pipeline=list(pipeline),
            test_mode=test_mode,
            indices=indices,
            serialize_data=serialize_data,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
            backend_args=backend_args)

    def load_data_list(self) -> list[dict]:
        """List the pairs.

        Returns:
            list[dict]: Data infos, see ``mmseg.BaseSegDataset``.
        """
        return _not_empty(self, _image_folder(self), super().load_data_list())


@DATASETS.register_module()
class GTADataset(RenderedDataset):
    """GTA5: 24,966 frames of a game (Richter et al., ECCV 2016).

    Made for the output of ``tools/dataset_converters/gta.py``: images
    ``images/00001.png``, labels ``labels/00001_labelTrainIds.png``. Some
    labels of the release have another size than their image; the converter
    lists the other pairs in ``pairs.txt``, and these are the data set. Its
    arguments are those of :class:`RenderedDataset`.
    """

    FOLDERS = dict(img_path='images', seg_map_path='labels')


@DATASETS.register_module()
class SynthiaDataset(RenderedDataset):
    """SYNTHIA-RAND-CITYSCAPES: 9,400 frames (Ros et al., CVPR 2016).

    Made for the output of ``tools/dataset_converters/synthia.py``: images
    ``RGB/0000000.png``, labels ``GT/LABELS/0000000_labelTrainIds.png``. The
    train ids 9 (terrain), 14 (truck) and 16 (train) never occur; results are
    published over the other 16 classes. Its arguments are those of
    :class:`RenderedDataset`.
    """

    FOLDERS = dict(img_path='RGB', seg_map_path='GT/LABELS')


@DATASETS.register_module()
class ACDCDataset(BaseSegDataset):
    """ACDC: fog, night, rain and snow (Sakaridis et al., ICCV 2021).

    Images are ``rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png``,
    labels ``gt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png``. The
    split ``test`` has no labels. The reference images in normal conditions
    (``<split>_ref``) are no part of it.

    Args:
        split (str): ``train``, ``val`` or ``test``.
        conditions (sequence[str]): Which of ``fog``, ``night``, ``rain`` and
            ``snow``.
        img_suffix (str): End of the names of images.
        seg_map_suffix (str): End of the names of label files.
        metainfo (dict, optional): See ``mmseg.BaseSegDataset``.
        data_root (str, optional): Folder of the data set.
        data_prefix (dict, optional): ``img_path`` and ``seg_map_path``, the
            folders that hold the conditions. None: ``rgb_anon`` and ``gt``.
        pipeline (list): Transforms.
        test_mode (bool): See ``mmengine.BaseDataset``.
        indices (int or list[int], optional): A subset.
        serialize_data (bool): See ``mmengine.BaseDataset``.
        lazy_init (bool): See ``mmengine.BaseDataset``.
        max_refetch (int): See ``mmengine.BaseDataset``.
        backend_args (dict, optional): See ``mmseg.BaseSegDataset``.

    Raises:
        ValueError: If an option is wrong, or the folder of a condition is
            missing or empty.
    """

    METAINFO = CityscapesDataset.METAINFO

    def __init__(self,
                 split: str = 'train',
                 conditions: Sequence[str] = _CONDITIONS,
                 img_suffix: str = '_rgb_anon.png',
                 seg_map_suffix: str = '_gt_labelTrainIds.png',
                 metainfo: dict | None = None,
                 data_root: str | None = None,
                 data_prefix: dict | None = None,
                 pipeline: list | tuple = (),
                 test_mode: bool = False,
                 indices: Any = None,
                 serialize_data: bool = True,
                 lazy_init: bool = False,
                 max_refetch: int = 1000,
                 backend_args: dict | None = None) -> None:
        if split not in _SPLITS:
            raise ValueError(
                f'ACDCDataset.split must be one of {_SPLITS}, but is '
                f'{split!r}')
        if (isinstance(conditions, str) or not conditions
                or not set(conditions) <= set(_CONDITIONS)):
            raise ValueError(
                'ACDCDataset.conditions must be a list of some of '
                f'{_CONDITIONS}, but is {conditions!r}')
        self.split = split
        self.conditions = tuple(conditions)
        if data_prefix is None:
            data_prefix = dict(img_path='rgb_anon', seg_map_path='gt')
        super().__init__(
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=data_prefix,
            pipeline=list(pipeline),
            test_mode=test_mode,
            indices=indices,
            serialize_data=serialize_data,
            lazy_init=lazy_init,
            max_refetch=max_refetch,
            backend_args=backend_args)

    def load_data_list(self) -> list[dict]:
        """List the pairs of the split in all wanted conditions.

        Returns:
            list[dict]: Data infos, see ``mmseg.BaseSegDataset``; those of
                the test split have no ``seg_map_path``.
        """
        folders = {
            condition: _image_folder(self, condition, self.split)
            for condition in self.conditions
        }
        found: list[dict] = []
        # the split lies in the middle of the path, where no prefix reaches
        everything = super().load_data_list()
        for folder in folders.values():
            found += _not_empty(self, folder, [
                info for info in everything
                if info['img_path'].startswith(os.path.join(folder, ''))
            ])
        if self.split == 'test':
            for info in found:
                info.pop('seg_map_path', None)
        return sorted(found, key=lambda info: info['img_path'])


def _image_folder(dataset: BaseSegDataset, *below: str) -> str:
    """A folder of images; if it is a local one, it must be there."""
    folder = os.path.join(dataset.data_prefix.get('img_path') or '', *below)
    local = not dataset.backend_args and '://' not in folder
    if local and not os.path.isdir(folder or '.'):
        raise ValueError(
            f'{type(dataset).__name__}: the folder {folder} does not exist; '
            'check data_root and data_prefix.img_path')
    return folder


def _not_empty(dataset: BaseSegDataset, folder: str, infos: list[dict]
               ) -> list[dict]:
    if not infos:
        source = dataset.ann_file or folder
        raise ValueError(
            f'{type(dataset).__name__}: no image found in {source}; check '
            f'data_root, data_prefix and img_suffix ({dataset.img_suffix})')
    return infos
