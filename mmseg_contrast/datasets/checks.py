"""What can be known to be wrong before training starts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmseg.registry import DATASETS


def check_keys(given: Iterable[str], known: Sequence[str], where: str
               ) -> None:
    """Refuse a misspelt key.

    Args:
        given (iterable[str]): Keys of the user's dict.
        known (sequence[str]): Keys it may have.
        where (str): The config path of the dict.

    Raises:
        ValueError: If there is an unknown key; proposes the closest one.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f', did you mean {close[0]!r}?' if close else ''
            raise ValueError(
                f'`{where}` has no key {key!r}{hint} (known keys: '
                f'{", ".join(known)})')


def build_dataset(config: Any, stream: str) -> Any:
    """Build a dataset, with one clear sentence where its files are missing.

    Args:
        config (dict or dataset): Config of any registered dataset or
            wrapper, or a built one.
        stream (str): Name of the stream.

    Returns:
        BaseDataset or wrapper: The dataset, fully initialised, not empty.

    Raises:
        ValueError: If a folder or list is missing or nothing is found.
    """
    if not isinstance(config, Mapping):
        dataset, places = config, type(config).__name__
    else:
        places = ', '.join(_image_places(config)) or str(config.get('type'))
        try:
            dataset = DATASETS.build(config)
            dataset.full_init()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f'stream {stream!r}: folder or file not found ({error}); '
                f'check `streams.{stream}.dataset`') from error
        except AssertionError as error:
            raise ValueError(
                f'stream {stream!r}: {error}; check '
                f'`streams.{stream}.dataset`') from error
        except ValueError as error:
            # mmengine serialises the list of files, and an empty list has
            # nothing to concatenate
            if 'need at least one array' not in str(error):
                raise
            raise ValueError(_empty(stream, places)) from error
    if len(dataset) == 0:
        raise ValueError(_empty(stream, places))
    return dataset


def _empty(stream: str, places: str) -> str:
    return (f'stream {stream!r}: no image found in {places}; check data_root, '
            f'data_prefix and img_suffix of `streams.{stream}.dataset`')


def _image_places(config: Any) -> list[str]:
    if isinstance(config, Mapping):
        if 'data_prefix' in config or 'data_root' in config:
            prefix = config.get('data_prefix') or {}
            return [os.path.join(config.get('data_root') or '',
                                 prefix.get('img_path') or '')]
        return _image_places(
            [config[k] for k in ('dataset', 'datasets') if k in config])
    if isinstance(config, (list, tuple)):
        return [place for c in config for place in _image_places(c)]
    return []


def check_files(infos: Iterable[dict], stream: str, labelled: bool) -> None:
    """Check that images and labels are there, one listing per folder.

    Args:
        infos (iterable[dict]): Data infos of a dataset.
        stream (str): Name of the stream.
        labelled (bool): Whether labels are needed.

    Raises:
        ValueError: If files are missing; names the first and the count.
    """
    listings: dict[str, set[str]] = {}

    def exists(path: Any) -> bool:
        if not isinstance(path, str) or '://' in path:
            return True
        folder, name = os.path.split(path)
        if folder not in listings:
            there = os.path.isdir(folder or '.')
            listings[folder] = set(
                os.listdir(folder or '.')) if there else set()
        return name in listings[folder]

    images: list[str] = []
    labels: list[str] = []
    count = 0
    for info in infos:
        count += 1
        if not exists(info.get('img_path')):
            images.append(info['img_path'])
        elif labelled and 'seg_map_path' in info and not exists(
                info['seg_map_path']):
            labels.append(info['seg_map_path'])
    if images:
        raise ValueError(
            f'stream {stream!r}: {len(images)} of {count} images are missing, '
            f'the first is {images[0]}; check `streams.{stream}.dataset`')
    if labels:
        raise ValueError(
            f'stream {stream!r}: {len(labels)} of {count} images have no '
            f'label file, the first missing one is {labels[0]}; check '
            'data_prefix.seg_map_path and seg_map_suffix of '
            f'`streams.{stream}.dataset`')
