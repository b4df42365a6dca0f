"""Small data sets on disk and stream configs for the tests of datasets."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from mmengine.registry import init_default_scope

import mmseg_contrast  # noqa: F401

init_default_scope('mmseg')
# as mmengine's runner does: OpenCV's threads only get in each other's way
cv2.setNumThreads(0)

CLASSES = ('road', 'car', 'sky')


def write_folder(root: Path, count: int = 4, size: tuple[int, int] = (24, 32),
                 classes: int = 3, seed: int = 0,
                 labels: np.ndarray | None = None) -> Path:
    """Write ``img_dir/*.png`` and ``ann_dir/*.png``; returns the root."""
    random = np.random.RandomState(seed)
    (root / 'img_dir').mkdir(parents=True)
    (root / 'ann_dir').mkdir()
    for i in range(count):
        image = random.randint(0, 256, (*size, 3)).astype(np.uint8)
        image[0, 0] = i  # tells images apart
        ids = random.randint(0, classes, size).astype(np.uint8)
        if labels is not None:
            ids = labels[i]
        cv2.imwrite(str(root / 'img_dir' / f'{i:03d}.png'), image)
        cv2.imwrite(str(root / 'ann_dir' / f'{i:03d}.png'), ids)
    return root


def folder(root: Path, pipeline: list, classes: tuple | None = CLASSES,
           **options) -> dict:
    """Config of a ``BaseSegDataset`` on such a folder."""
    meta = {} if classes is None else dict(
        classes=classes, palette=[[i, i, i] for i in range(len(classes))])
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path='img_dir', seg_map_path='ann_dir'),
        img_suffix='.png',
        seg_map_suffix='.png',
        metainfo=meta,
        pipeline=pipeline,
        **options)


def files_pipeline(*steps: dict, labels: bool = True, pack: str =
                   'PackSegInputs') -> list[dict]:
    """A pipeline on files."""
    load = [dict(type='LoadImageFromFile')]
    load += [dict(type='LoadAnnotations')] if labels else []
    return [*load, *steps, dict(type=pack)]


def streets_pipeline(*steps: dict, labels: bool = True, pack: str =
                     'PackSegInputs') -> list[dict]:
    """A pipeline on the embedded streets."""
    load = [dict(type='LoadSyntheticImage')]
    load += [dict(type='LoadSyntheticLabels')] if labels else []
    return [*load, *steps, dict(type=pack)]


def streets(domain: str, count: int, *steps: dict, labels: bool = True,
            **options) -> dict:
    """Config of a small ``SyntheticStreets``."""
    return dict(
        type='SyntheticStreets',
        domain=domain,
        num_images=count,
        size=(64, 32),
        pipeline=streets_pipeline(*steps, labels=labels),
        **options)
