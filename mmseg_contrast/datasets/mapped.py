"""A dataset seen through a label map, for validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.registry import DATASETS

from .label_map import LabelMap
from .pipelines import insert_after_annotations
from .transforms.map_labels import MapLabelIds


@DATASETS.register_module()
class MappedDataset:
    """Any dataset with its labels brought to other classes, by name.

    What ``label_map`` is to a stream in training, this is to a validation or
    test loader.

    Args:
        dataset (dict): Config of any mmseg dataset that declares classes.
        label_map (dict): Options of :class:`LabelMap`.

    Raises:
        ValueError: If a class of the dataset has no counterpart.
    """

    def __init__(self, dataset: Mapping[str, Any],
                 label_map: Mapping[str, Any]) -> None:
        self.dataset = DATASETS.build(dict(dataset))
        self._map = LabelMap(**label_map)
        own = self.dataset.metainfo.get('classes')
        if own is None:
            raise ValueError(
                'MappedDataset.dataset declares no classes: set '
                'metainfo=dict(classes=[...]) in it')
        where = 'MappedDataset'
        self._map.check_keys(own, where)
        table = self._map.table(own, where)
        self._map.log(own, where)
        insert_after_annotations(
            self.dataset, MapLabelIds(table, where, len(own)))
        self.metainfo = dict(
            self.dataset.metainfo,
            classes=self._map.classes,
            palette=self._map.colours(
                own, self.dataset.metainfo.get('palette') or []))

    def full_init(self) -> None:
        """Read the list of files."""
        self.dataset.full_init()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """An item of the dataset with mapped labels."""
        return self.dataset[index]

    def get_data_info(self, index: int) -> dict:
        """What the dataset knows of an image."""
        return self.dataset.get_data_info(index)
