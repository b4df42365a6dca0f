"""Reads the items of one dataset: loading first, the rest on a copy."""

from __future__ import annotations

import copy
import os
from typing import Any

from mmcv.transforms import LoadAnnotations
from PIL import Image

from .pipelines import is_plain, split_loading
from .transforms.map_labels import MapLabelIds

_TAIL = 4096
_END_MARKS = {'.jpg': b'\xff\xd9', '.jpeg': b'\xff\xd9', '.png': b'IEND'}


class Reader:
    """One dataset of a stream, read in two steps.

    Args:
        dataset (BaseDataset or wrapper): A built dataset whose pipeline is
            already adapted to the stream.
        stream (str): Name of the stream, for messages.
        labelled (bool): Whether label files may be read.
        cache (bool): Whether to keep what the loading transforms give.
    """

    def __init__(self, dataset: Any, stream: str, labelled: bool,
                 cache: bool) -> None:
        self.dataset = dataset
        self.stream = stream
        self.labelled = labelled
        self.plain = is_plain(dataset)
        self.loading: list = []
        self.rest: list = []
        if self.plain:
            self.loading, self.rest = split_loading(
                list(dataset.pipeline.transforms))
        self._cache: dict[int, dict] | None = {} if cache else None

    def info(self, index: int) -> dict:
        """What the dataset knows of an item, without reading files.

        Args:
            index (int): Index in the dataset.

        Returns:
            dict: Its data info; an unlabelled stream's has no label path,
                so that nothing behind can read a label.
        """
        info = self.dataset.get_data_info(index)
        info.setdefault('seg_fields', [])
        if not self.labelled:
            info.pop('seg_map_path', None)
        return info

    def load(self, index: int) -> dict | None:
        """Run the loading transforms, or take their results from the cache.

        Args:
            index (int): Index in the dataset.

        Returns:
            dict or None: Results to be handed to :meth:`finish`; None if the
                pipeline rejects the item.

        Raises:
            ValueError: If a file cannot be read; names it.
        """
        if not self.plain:
            return dict(index=index)
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        results = self.info(index)
        for transform in self.loading:
            done = self._apply(transform, results)
            if done is None:
                return None
            results = done
        if self._cache is not None:
            self._cache[index] = results
        return results

    def finish(self, results: dict, keep: bool = False) -> dict | None:
        """Run the remaining transforms.

        Args:
            results (dict): What :meth:`load` gave.
            keep (bool): Whether ``results`` is needed again.

        Returns:
            dict or None: ``inputs`` and ``data_samples``; None if the
                pipeline rejects the item.

        Raises:
            ValueError: If a transform fails; names it and the file.
        """
        if not self.plain:
            return self._opaque_item(results['index'])
        if keep or self._cache is not None:
            results = copy.deepcopy(results)
        item = results
        for transform in self.rest:
            done = self._apply(transform, item)
            if done is None:
                return None
            item = done
        return self._checked(item, results.get('img_path'))

    def load_labels(self, index: int) -> dict:
        """Read and map only the labels of an item.

        Args:
            index (int): Index in the dataset.

        Returns:
            dict: Results with ``gt_seg_map``.

        Raises:
            ValueError: If the file cannot be read; names it.
        """
        results = self.info(index)
        for transform in self.loading:
            if isinstance(transform, (LoadAnnotations, MapLabelIds)):
                results = self._apply(transform, results) or results
        return results

    def _apply(self, transform: Any, results: dict) -> dict | None:
        try:
            if hasattr(transform, 'imdecode_backend'):
                self._check_complete(transform, results)
            return transform(results)
        except Exception as error:
            if isinstance(transform, MapLabelIds):
                raise
            raise self._explain(transform, results, error) from error

    def _check_complete(self, transform: Any, results: dict) -> None:
        key = ('seg_map_path' if isinstance(transform, LoadAnnotations)
               else 'img_path')
        path = results.get(key)
        if isinstance(path, str):
            refuse_truncated(path)

    def _explain(self, transform: Any, results: dict,
                 error: Exception) -> ValueError:
        kind = type(transform).__name__
        name, image = self.stream, results.get('img_path')
        reason = f'{type(error).__name__}: {error}'
        if isinstance(transform, LoadAnnotations):
            path = results.get('seg_map_path', image)
            return ValueError(
                f'stream {name!r}: cannot read the label file {path} '
                f'({reason})')
        if transform in self.loading and 'img' not in results:
            return ValueError(
                f'stream {name!r}: cannot read the image {image} ({reason})')
        return ValueError(
            f'stream {name!r}: {kind} of `streams.{name}.dataset.pipeline` '
            f'failed on {image} ({reason})')

    def _opaque_item(self, index: int) -> dict | None:
        try:
            item = self.dataset[index]
        except Exception as error:
            raise ValueError(
                f'stream {self.stream!r}: {type(self.dataset).__name__} '
                f'failed on item {index} ({type(error).__name__}: {error})'
            ) from error
        return None if item is None else self._checked(item, f'item {index}')

    def _checked(self, item: Any, path: Any) -> dict:
        key = f'`streams.{self.stream}.dataset.pipeline`'
        if not isinstance(item, dict) or not {'inputs', 'data_samples'
                                              } <= item.keys():
            raise ValueError(f'{key} must end with PackSegInputs or '
                             f'PackStreamInputs (seen on {path})')
        has_labels = 'gt_sem_seg' in item['data_samples']
        if self.labelled and not has_labels:
            raise ValueError(
                f'stream {self.stream!r} is labelled, but {key} gives no '
                f'labels for {path}: add LoadAnnotations')
        if has_labels and not self.labelled:
            raise ValueError(
                f'stream {self.stream!r} is unlabelled, but {key} reads '
                f'labels of {path}: remove the transform that loads them')
        return item


def refuse_truncated(path: str) -> None:
    """Refuse a local JPEG or PNG file that ends too early.

    OpenCV decodes such a file into an image whose lower part is grey. Only
    the last bytes are read; where they have no end mark, Pillow's strict
    decoder decides.

    Args:
        path (str): Path of the file; other formats and remote files pass.

    Raises:
        OSError: If the file is truncated.
    """
    mark = _END_MARKS.get(os.path.splitext(path)[1].lower())
    if mark is None or not os.path.isfile(path):
        return
    with open(path, 'rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        complete = mark in file.read()
    if not complete:
        with Image.open(path) as image:
            image.load()
