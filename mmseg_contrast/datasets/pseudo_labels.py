"""Lets a stream read pseudo-labels from files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import PackSegInputs

from .pipelines import flatten, is_plain
from .pseudo_label_files import check_classes, label_file, read_manifest
from .synthetic import LoadSyntheticImage
from .transforms.load_pseudo_labels import LoadPseudoLabels
from .transforms.valid_region import PackStreamInputs


def image_root(dataset: Any) -> str:
    """The folder below which a dataset's images lie, '' for none.

    Args:
        dataset (BaseDataset): A built dataset.
    """
    prefix = getattr(dataset, 'data_prefix', None) or {}
    return str(prefix.get('img_path') or '')


def label_folders(datasets: Sequence[Any], folder: str
                  ) -> list[tuple[Any, str]]:
    """Where the pseudo-labels of each dataset lie.

    Args:
        datasets (sequence): Built datasets or wrappers of one stream.
        folder (str): The folder of the stream.

    Returns:
        list[tuple]: Every inner dataset once, with its folder: the stream's
        itself, or ``0``, ``1``, ... in it if there are several, whose images
        may have the same names.
    """
    found: list[Any] = []
    for one in datasets:
        for part, _ in flatten(one):
            if not any(part is known for known in found):
                found.append(part)
    if len(found) == 1:
        return [(found[0], folder)]
    return [(part, os.path.join(folder, str(number)))
            for number, part in enumerate(found)]


def read_pseudo_labels(datasets: Sequence[Any], folder: str, stream: str,
                       classes: Sequence[str] | None) -> None:
    """Make the pipelines of a stream read pseudo-labels.

    Args:
        datasets (sequence): Its built datasets; pipelines are changed in
            place.
        folder (str): The folder of pseudo-labels.
        stream (str): Name of the stream.
        classes (sequence[str], optional): Classes of the run, if known.

    Raises:
        ValueError: If the folder does not fit, a file is missing, or a
            pipeline cannot carry them.
    """
    where = f'streams.{stream}.pseudo_labels'
    manifest = read_manifest(folder, where)
    kind, count = 'hard', len(classes) if classes else None
    if manifest is not None:
        check_classes(manifest, classes, where)
        kind = manifest['kind']
        count = count or len(manifest.get('classes') or []) or None
    for dataset, place in label_folders(datasets, folder):
        if not is_plain(dataset):
            raise ValueError(
                f'`{where}` cannot look into {type(dataset).__name__}: leave '
                'it out, or take a dataset that reads files itself')
        root = image_root(dataset)
        _check_there(dataset, place, root, kind, stream)
        transforms = dataset.pipeline.transforms
        if not any(isinstance(t, PackStreamInputs) for t in transforms):
            last = PackSegInputs.__name__
            raise ValueError(
                f'`{where}` adds a field that {last} does not pack: end '
                f'`streams.{stream}.dataset.pipeline` with PackStreamInputs')
        loaders = [i for i, t in enumerate(transforms)
                   if isinstance(t, (LoadImageFromFile, LoadSyntheticImage))]
        place_at = loaders[0] + 1 if loaders else 1
        transforms.insert(
            place_at, LoadPseudoLabels(place, root, kind, count))


def _check_there(dataset: Any, folder: str, root: str, kind: str,
                 stream: str) -> None:
    """Every image has its file, by one listing per folder."""
    listings: dict[str, set[str]] = {}
    missing = []
    for index in range(len(dataset)):
        path = label_file(
            folder, dataset.get_data_info(index)['img_path'], root, kind)
        parent, name = os.path.split(path)
        if parent not in listings:
            listings[parent] = set(
                os.listdir(parent) if os.path.isdir(parent) else ())
        if name not in listings[parent]:
            missing.append(path)
    if missing:
        raise ValueError(
            f'stream {stream!r}: {len(missing)} of {len(dataset)} images have '
            f'no pseudo-label, the first missing file is {missing[0]}; run '
            'tools/generate_pseudo_labels.py for this stream')
