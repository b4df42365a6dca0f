"""Taking stock datasets apart: wrappers, pipelines, loading transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dataset import (
    BaseDataset,
    ClassBalancedDataset,
    ConcatDataset,
    RepeatDataset,
)
from mmseg.datasets.transforms import RandomCrop, Resize

from .synthetic import LoadSyntheticImage
from .transforms.load_pseudo_labels import LoadPseudoLabels
from .transforms.map_labels import MapLabelIds
from .transforms.valid_region import MarkValidRegion


def flatten(dataset: Any) -> list[tuple[Any, np.ndarray]]:
    """See through mmengine's wrappers: which items of which datasets.

    Args:
        dataset (BaseDataset or wrapper): Any stock dataset.

    Returns:
        list[tuple]: ``(dataset, indices)`` in the order of the wrapper;
            a dataset may occur several times. A wrapper that makes its own
            items (e.g. ``MultiImageMixDataset``) is taken as one dataset.
    """
    if isinstance(dataset, ConcatDataset):
        return [part for d in dataset.datasets for part in flatten(d)]
    if isinstance(dataset, RepeatDataset):
        return flatten(dataset.dataset) * dataset.times
    if isinstance(dataset, ClassBalancedDataset):
        parts = flatten(dataset.dataset)
        which = np.concatenate(
            [np.full(len(idx), i) for i, (_, idx) in enumerate(parts)])
        index = np.concatenate([idx for _, idx in parts])
        chosen = np.asarray(dataset.repeat_indices)
        which, index = which[chosen], index[chosen]
        return [(parts[i][0], index[which == i]) for i in range(len(parts))]
    return [(dataset, np.arange(len(dataset)))]


def inner_datasets(dataset: Any) -> list[Any]:
    """All datasets inside wrappers of any kind that read files themselves.

    Args:
        dataset (BaseDataset or wrapper): Any dataset.

    Returns:
        list: The innermost datasets, each once.
    """
    inner = getattr(dataset, 'datasets', None)
    if inner is None and not isinstance(dataset, BaseDataset):
        inner = [dataset.dataset] if hasattr(dataset, 'dataset') else None
    if inner is None:
        return [dataset]
    found: list[Any] = []
    for part in inner:
        found += [d for d in inner_datasets(part)
                  if not any(d is known for known in found)]
    return found


def is_plain(dataset: Any) -> bool:
    """Whether an item is just ``pipeline(get_data_info(index))``.

    Args:
        dataset: The dataset.

    Returns:
        bool: True if it can be read in two steps: loading, and the rest.
    """
    kind = type(dataset)
    return (isinstance(dataset, BaseDataset)
            and kind.prepare_data is BaseDataset.prepare_data
            and kind.__getitem__ is BaseDataset.__getitem__)


def pipeline_lists(dataset: Any) -> list[list]:
    """The lists of transforms of a dataset, outer ones first.

    Args:
        dataset: The dataset.

    Returns:
        list[list]: The very lists, so that a change in them has effect;
            nested ones (``RandomApply``, ``RandomChoice``, ...) included.
    """
    pipeline = getattr(dataset, 'pipeline', None)
    lists: list[list] = []

    def visit(node: Any) -> None:
        if isinstance(node, list):
            lists.append(node)
            for child in node:
                visit(child)
        elif getattr(node, 'transforms', None) is not None:
            visit(node.transforms)

    visit(pipeline)
    return lists


def all_transforms(dataset: Any) -> Iterator[Any]:
    """Every transform of a dataset, nested ones included.

    Args:
        dataset: The dataset.

    Yields:
        BaseTransform: One transform after the other.
    """
    for transforms in pipeline_lists(dataset):
        yield from (t for t in transforms if not isinstance(t, list))


def drop_annotations(dataset: Any) -> None:
    """Remove every transform that reads a label file.

    Args:
        dataset: The dataset; its pipeline is changed in place.
    """
    for transforms in pipeline_lists(dataset):
        transforms[:] = [
            t for t in transforms if not isinstance(t, LoadAnnotations)
        ]


def insert_after_annotations(dataset: Any, transform: MapLabelIds) -> bool:
    """Put a transform right behind the one that reads the label file.

    Args:
        dataset: The dataset; its pipeline is changed in place.
        transform (MapLabelIds): What to insert.

    Returns:
        bool: Whether the pipeline reads labels at all.
    """
    found = False
    for transforms in pipeline_lists(dataset):
        for i in range(len(transforms) - 1, -1, -1):
            if isinstance(transforms[i], LoadAnnotations):
                transforms.insert(i + 1, transform)
                found = True
    return found


def class_balanced_crops(dataset: Any) -> list[RandomCrop]:
    """The random crops that look at the label map to choose their place.

    Args:
        dataset: The dataset.

    Returns:
        list[RandomCrop]: Crops with ``cat_max_ratio`` below 1.
    """
    return [
        t for t in all_transforms(dataset)
        if isinstance(t, RandomCrop) and t.cat_max_ratio < 1
    ]


def split_loading(transforms: list) -> tuple[list, list]:
    """Cut a pipeline behind its leading deterministic part.

    Args:
        transforms (list): The transforms of a pipeline.

    Returns:
        tuple[list, list]: What loads image and label (mapping of ids,
            pseudo-labels, valid region and a fixed resize included), and
            everything else.
    """
    steps = 0
    for transform in transforms:
        fixed = isinstance(
            transform,
            (LoadImageFromFile, LoadAnnotations, MapLabelIds,
             LoadSyntheticImage, LoadPseudoLabels, MarkValidRegion)) or type(
                 transform) is Resize
        if not fixed:
            break
        steps += 1
    return transforms[:steps], transforms[steps:]
