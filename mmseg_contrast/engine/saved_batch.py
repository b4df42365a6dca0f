"""A batch of the loader as a file that can be looked at and run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from ..files import written_whole

_KINDS: dict[str, type[BaseDataElement]] = {
    'SegDataSample': SegDataSample, 'PixelData': PixelData}
_KIND = '__kind__'


def save_batch(path: Path, batch: Mapping[str, Any],
               facts: Mapping[str, Any]) -> None:
    """Write a batch with plain types: ``weights_only=True`` reads it.

    Args:
        path (Path): The file.
        batch (Mapping): ``inputs`` and ``data_samples`` as the loader gives
            them.
        facts (Mapping): What else is to be known of it.
    """
    with written_whole(path) as file:
        torch.save(_plain({**facts, **batch}), file)


def load_batch(path: str | Path) -> dict[str, Any]:
    """A saved batch as ``model.data_preprocessor`` takes it.

    Args:
        path (str or Path): A file of :func:`save_batch`.

    Returns:
        dict: ``inputs`` and ``data_samples``.
    """
    content = torch.load(path, map_location='cpu', weights_only=True)
    return {key: _element(content[key]) for key in (
        'inputs', 'data_samples')}


def image_paths(batch: Mapping[str, Any]) -> dict[str, list[str]]:
    """Files that the images come from, by stream ('' without streams).

    Args:
        batch (Mapping): As in :func:`save_batch`.
    """
    return {stream: [str(sample.metainfo.get('img_path', '?'))
                     for sample in _flat(samples)]
            for stream, samples in _streams(batch, 'data_samples')}


def broken_images(batch: Mapping[str, Any]) -> dict[str, list[str]]:
    """By stream, the files whose images are not finite as loaded.

    Args:
        batch (Mapping): As in :func:`save_batch`.
    """
    paths = image_paths(batch)
    found: dict[str, list[str]] = {}
    for stream, images in _streams(batch, 'inputs'):
        for image, path in zip(_flat(images), paths[stream], strict=False):
            if not torch.as_tensor(image).isfinite().all():
                found.setdefault(stream, []).append(path)
    return found


def unlabelled(batch: Mapping[str, Any], ignore_index: int = 255
               ) -> list[str]:
    """Streams with label maps in which no pixel has a label.

    Args:
        batch (Mapping): As in :func:`save_batch`.
        ignore_index (int): Label that is ignored.
    """
    names = []
    for stream, samples in _streams(batch, 'data_samples'):
        labels = [sample.gt_sem_seg.data for sample in _flat(samples)
                  if 'gt_sem_seg' in sample]
        if labels and all(bool((one == ignore_index).all())
                          for one in labels):
            names.append(stream)
    return names


def _streams(batch: Mapping[str, Any], key: str
             ) -> Iterator[tuple[str, Any]]:
    part = batch.get(key, [])
    yield from part.items() if isinstance(part, Mapping) else [('', part)]


def _flat(items: Any) -> list:
    """Streams with several images a position come as lists of lists."""
    flat: list = []
    for item in items:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    return flat


def _plain(value: Any) -> Any:
    """Tensors, numbers, text, lists and dicts; anything else as its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    if isinstance(value, BaseDataElement):
        return {_KIND: type(value).__name__,
                'metainfo': _plain(dict(value.metainfo_items())),
                'data': _plain(dict(value.items()))}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(
            _plain(one) for one in value)
    return str(value)


def _element(value: Any) -> Any:
    """What :func:`_plain` was made of."""
    if isinstance(value, list):
        return [_element(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get(_KIND) not in _KINDS:
        return {key: _element(one) for key, one in value.items()}
    element = _KINDS[value[_KIND]](metainfo=value['metainfo'])
    for key, one in value['data'].items():
        element.set_data({key: _element(one)})
    return element
