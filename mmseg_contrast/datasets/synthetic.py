"""An embedded data set: procedural streets in two domains, no files."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS, TRANSFORMS

from .seeding import seed_sequence
from .street_scene import (
    CLASSES,
    PALETTE,
    Scene,
    build_scene,
    paint_image,
    paint_labels,
)

DOMAINS = ('source', 'target')
SPLITS = ('train', 'val')
_DEFAULT_NUMBER = dict(train=400, val=100)


@DATASETS.register_module()
class SyntheticStreets(BaseSegDataset):
    """Procedural street scenes; same layout, two appearances.

    ``source`` is a clear day, ``target`` a hazy dusk with lights, blur and
    noise. Every image is drawn when it is asked for, from ``(seed, domain,
    split, index)`` alone. Pipelines load it with ``LoadSyntheticImage`` and
    ``LoadSyntheticLabels``. Domains and splits show different streets.

    Args:
        domain (str): ``source`` or ``target``.
        split (str): ``train`` or ``val``.
        num_images (int, optional): Number of images; None means 400 for
            train and 100 for val.
        size (tuple[int, int]): Width and height.
        seed (int): Seed of the world.
        pipeline (list): Transforms.
        test_mode (bool): See ``mmengine.BaseDataset``.
        metainfo (dict, optional): See ``mmengine.BaseDataset``.
        indices (int or list[int], optional): A subset.
        serialize_data (bool): See ``mmengine.BaseDataset``.
        lazy_init (bool): See ``mmengine.BaseDataset``.
        max_refetch (int): See ``mmengine.BaseDataset``.

    Raises:
        ValueError: If an option is out of range.
    """

    METAINFO = dict(classes=CLASSES, palette=PALETTE)

    def __init__(self,
                 domain: str = 'source',
                 split: str = 'train',
                 num_images: int | None = None,
                 size: tuple[int, int] = (256, 128),
                 seed: int = 0,
                 pipeline: list | tuple = (),
                 test_mode: bool = False,
                 metainfo: dict | None = None,
                 indices: Any = None,
                 serialize_data: bool = True,
                 lazy_init: bool = False,
                 max_refetch: int = 1000) -> None:
        if domain not in DOMAINS:
            raise ValueError(f'SyntheticStreets.domain must be one of '
                             f'{DOMAINS}, but is {domain!r}')
        if split not in SPLITS:
            raise ValueError(f'SyntheticStreets.split must be one of '
                             f'{SPLITS}, but is {split!r}')
        if num_images is None:
            num_images = _DEFAULT_NUMBER[split]
        if num_images < 1 or min(size) < 16:
            raise ValueError(
                'SyntheticStreets needs num_images of at least 1 and a size '
                f'of at least 16 x 16, but has {num_images} and {size}')
        self.domain = domain
        self.split = split
        self.num_images = num_images
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        super().__init__(
            pipeline=list(pipeline),
            test_mode=test_mode,
            metainfo=metainfo,
            indices=indices,
            serialize_data=serialize_data,
            lazy_init=lazy_init,
            max_refetch=max_refetch)

    def load_data_list(self) -> list[dict]:
        """List the images that can be drawn.

        Returns:
            list[dict]: Data infos; ``img_path`` is a name, not a file.
        """
        return [
            dict(
                img_path=f'synthetic://{self.domain}/{self.split}/{i:06d}',
                seg_map_path=(
                    f'synthetic://{self.domain}/{self.split}/{i:06d}_labels'),
                street=dict(
                    domain=self.domain,
                    split=self.split,
                    index=i,
                    size=self.size,
                    seed=self.seed),
                label_map=self.label_map,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[]) for i in range(self.num_images)
        ]


def _random(street: dict, purpose: str) -> np.random.RandomState:
    words = seed_sequence(street['seed'], street['domain'], street['split'],
                          street['index'], purpose).generate_state(4)
    # RandomState is frozen: NumPy will never change what it draws
    return np.random.RandomState(words)


def _scene(street: dict) -> Scene:
    return build_scene(_random(street, 'layout'))


@TRANSFORMS.register_module()
class LoadSyntheticImage(BaseTransform):
    """Draw the image of an entry of ``SyntheticStreets``."""

    def transform(self, results: dict) -> dict:
        """Add ``img``.

        Args:
            results (dict): Data info with ``street``.

        Returns:
            dict: The same with ``img`` (BGR uint8), ``img_shape`` and
                ``ori_shape``.
        """
        street = results['street']
        image = paint_image(
            _scene(street), tuple(street['size']), street['domain'],
            _random(street, 'look'))
        results['img'] = image
        results['img_shape'] = image.shape[:2]
        results['ori_shape'] = image.shape[:2]
        return results

    def __repr__(self) -> str:
        """The name."""
        return f'{type(self).__name__}()'


@TRANSFORMS.register_module()
class LoadSyntheticLabels(LoadAnnotations):
    """Draw the label map of an entry of ``SyntheticStreets``.

    A subclass of mmcv's ``LoadAnnotations``, so that what holds for label
    files (an unlabelled stream never reads them) holds here.
    """

    def __init__(self) -> None:
        super().__init__(with_bbox=False, with_label=False, with_seg=True)

    def transform(self, results: dict) -> dict:
        """Add ``gt_seg_map``.

        Args:
            results (dict): Data info with ``street``.

        Returns:
            dict: The same with ``gt_seg_map``, uint8 ``(h, w)``.
        """
        street = results['street']
        labels = paint_labels(_scene(street), tuple(street['size']))
        if results.get('label_map'):
            # the dataset was built with a subset of the classes
            table = np.arange(256, dtype=np.uint8)
            for old, new in results['label_map'].items():
                table[old] = new
            labels = table[labels]
        results['gt_seg_map'] = labels
        results['seg_fields'] = [
            *results.get('seg_fields', []), 'gt_seg_map'
        ]
        return results

    def __repr__(self) -> str:
        """The name."""
        return f'{type(self).__name__}()'
