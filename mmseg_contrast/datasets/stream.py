"""One named stream of the loader: its datasets and its draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmcv.transforms import Pad
from mmseg.datasets.transforms import PackSegInputs

from .checks import build_dataset, check_files, check_keys
from .label_map import LabelMap, identity_table
from .pipelines import (
    all_transforms,
    class_balanced_crops,
    drop_annotations,
    flatten,
    inner_datasets,
    insert_after_annotations,
    is_plain,
    pipeline_lists,
)
from .pseudo_labels import read_pseudo_labels
from .rare_class import RareClassDraw
from .reader import Reader
from .seeding import permutation, seed_everything
from .transforms.map_labels import MapLabelIds
from .transforms.valid_region import (
    MarkValidRegion,
    PackStreamInputs,
    PadValidRegion,
)

# A pipeline may reject an item by returning None. More rejections in a row
# than this are a mistake and not bad luck.
_MAX_REJECTED = 10


class Stream:
    """Turns ``(seed, position, k)`` into a sample.

    Args:
        name (str): Name of the stream.
        dataset (dict, optional): Config of its dataset (or a built one).
        datasets (list[dict], optional): Several of them instead.
        labelled (bool): Whether its labels may be read.
        ratio (int): Samples of this stream per position.
        dataset_weights (list[float], optional): Share of every dataset in
            an epoch, rounded to whole images. None: their lengths.
        label_map (dict or LabelMap, optional): See :class:`LabelMap`.
        rare_class (dict, optional): See :class:`RareClassDraw`.
        cache (bool): Keep what the loading transforms give (decoded image,
            mapped labels, fixed resize) in the memory of each process.
        pseudo_labels (str, optional): Folder of labels that
            ``tools/generate_pseudo_labels.py`` made for these images; they
            are read as a field of their own, also if the stream is not
            labelled.

    Raises:
        ValueError: For every mistake that can be seen here.
    """

    def __init__(self,
                 name: str,
                 dataset: Any = None,
                 datasets: Sequence[Any] | None = None,
                 labelled: bool = True,
                 ratio: int = 1,
                 dataset_weights: Sequence[float] | None = None,
                 label_map: Mapping[str, Any] | LabelMap | None = None,
                 rare_class: Mapping[str, Any] | None = None,
                 cache: bool = False,
                 pseudo_labels: str | None = None) -> None:
        self.name = name
        self.labelled = labelled
        self.ratio = ratio
        self._check_arguments(dataset, datasets, dataset_weights, rare_class)
        configs = [dataset] if datasets is None else list(datasets)
        built = [build_dataset(c, name) for c in configs]
        self._check_pipelines(built)
        self._set_classes(built, label_map)
        self._adapt_pipelines(built)
        if pseudo_labels is not None:
            read_pseudo_labels(built, pseudo_labels, name, self.classes)
        self._make_readers(built, cache)
        self._set_shares(built, dataset_weights)
        self._try_first_items()
        self.rare_class = self._rare_class(rare_class)
        self._epoch: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of items of all datasets together."""
        return len(self._items)

    # -- construction, in the order of __init__ ---------------------------
    def _check_arguments(self, dataset: Any, datasets: Sequence[Any] | None,
                         weights: Sequence[float] | None,
                         rare_class: Mapping[str, Any] | None) -> None:
        where = f'`streams.{self.name}'
        if (dataset is None) == (datasets is None):
            raise ValueError(
                f'{where}` needs either `dataset` or `datasets`')
        if datasets is not None and len(datasets) == 0:
            raise ValueError(f'{where}.datasets` is empty')
        if (not isinstance(self.ratio, int) or isinstance(self.ratio, bool)
                or self.ratio < 1):
            raise ValueError(
                f'{where}.ratio` must be a whole number of at least 1, but '
                f'is {self.ratio!r}')
        if not isinstance(self.labelled, bool):
            raise ValueError(
                f'{where}.labelled` must be True or False, but is '
                f'{self.labelled!r}')
        if weights is not None:
            count = 1 if datasets is None else len(datasets)
            if len(weights) != count:
                raise ValueError(
                    f'{where}.dataset_weights` has {len(weights)} entries '
                    f'for {count} datasets')
            if min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(
                    f'{where}.dataset_weights` must not be negative nor all '
                    f'zero, but is {list(weights)}')
        if rare_class is not None and not self.labelled:
            raise ValueError(
                f'{where}.rare_class` needs labels, but the stream is not '
                'labelled')

    def _check_pipelines(self, built: list[Any]) -> None:
        where = f'`streams.{self.name}.dataset.pipeline`'
        for dataset in _with_inner(built):
            if not self.labelled and class_balanced_crops(dataset):
                raise ValueError(
                    f'{where}: RandomCrop with cat_max_ratio < 1 looks at '
                    'labels, and this stream has none: set '
                    'cat_max_ratio=1.0')
            kinds = list(all_transforms(dataset))
            marked = any(isinstance(t, MarkValidRegion) for t in kinds)
            packed = [t for t in kinds if isinstance(t, PackSegInputs)]
            if marked and packed and not all(
                    isinstance(t, PackStreamInputs) for t in packed):
                raise ValueError(
                    f'{where} has MarkValidRegion, whose field PackSegInputs '
                    'does not pack: end it with PackStreamInputs')

    def _set_classes(self, built: list[Any],
                     label_map: Mapping[str, Any] | LabelMap | None) -> None:
        if isinstance(label_map, Mapping):
            known = ('classes', 'mapping', 'palette', 'ignore')
            options = {k: v for k, v in label_map.items() if k != 'type'}
            check_keys(options, known, f'streams.{self.name}.label_map')
            if 'classes' not in options:
                raise ValueError(
                    f'`streams.{self.name}.label_map` needs `classes`')
            label_map = LabelMap(**options)
        self.label_map = label_map
        metas = [d.metainfo for d in built]
        names = [tuple(m['classes']) if m.get('classes') else None
                 for m in metas]
        if self.labelled and None in names:
            raise ValueError(
                f'stream {self.name!r} is labelled, but its dataset declares '
                'no classes: set metainfo=dict(classes=[...]) in '
                f'`streams.{self.name}.dataset`')
        declared = [n for n in names if n is not None]
        self.classes: tuple[str, ...] | None
        self.palette: list | None
        if label_map is not None:
            where = f'streams.{self.name}'
            everything = list(dict.fromkeys(c for n in declared for c in n))
            label_map.check_keys(everything, where)
            for own in dict.fromkeys(declared):
                label_map.table(own, where)
                label_map.log(own, where)
            first = names.index(declared[0]) if declared else None
            own_palette = [] if first is None else metas[first].get('palette')
            self.classes = label_map.classes
            self.palette = label_map.colours(
                declared[0] if declared else (), own_palette or [])
            return
        for other in declared[1:]:
            if other != declared[0]:
                raise ValueError(
                    f'the datasets of stream {self.name!r} have different '
                    f'classes ({first_difference(declared[0], other)}): give '
                    f'`streams.{self.name}.label_map`')
        self.classes = declared[0] if declared else None
        self.palette = None
        if declared:
            self.palette = metas[names.index(declared[0])].get('palette')

    def _adapt_pipelines(self, built: list[Any]) -> None:
        for dataset in _with_inner(built):
            # a rejected item is drawn again below, never a thousand times
            if hasattr(dataset, 'max_refetch'):
                dataset.max_refetch = min(dataset.max_refetch, _MAX_REJECTED)
            for transforms in pipeline_lists(dataset):
                for i in range(len(transforms) - 1, -1, -1):
                    if isinstance(transforms[i], Pad):
                        transforms.insert(i + 1, PadValidRegion())
            if not self.labelled:
                drop_annotations(dataset)
                continue
            own = dataset.metainfo.get('classes')
            if own is None:
                continue
            if self.label_map is None:
                table = identity_table(
                    len(own), getattr(dataset, 'ignore_index', 255))
            else:
                table = self.label_map.table(
                    own, f'streams.{self.name}')
            insert_after_annotations(
                dataset, MapLabelIds(table, self.name, len(own)))

    def _make_readers(self, built: list[Any], cache: bool) -> None:
        readers: list[Reader] = []
        which, index, counts = [], [], []
        for dataset in built:
            counts.append(0)
            for part, indices in flatten(dataset):
                known = [i for i, r in enumerate(readers)
                         if r.dataset is part]
                if not known:
                    readers.append(
                        Reader(part, self.name, self.labelled, cache))
                    if is_plain(part):
                        check_files(
                            (part.get_data_info(i) for i in range(len(part))),
                            self.name, self.labelled)
                number = known[0] if known else len(readers) - 1
                which.append(np.full(len(indices), number))
                index.append(indices)
                counts[-1] += len(indices)
        self.readers = readers
        # row: number of the reader, index in its dataset
        self._items = np.stack(
            [np.concatenate(which), np.concatenate(index)], axis=1)
        self._counts = counts
        if cache and not all(r.plain for r in readers):
            raise ValueError(
                f'`streams.{self.name}.cache` cannot look into '
                f'{type(built[0]).__name__}: set it to False')

    def _set_shares(self, built: list[Any],
                    weights: Sequence[float] | None) -> None:
        """Images of every dataset in an epoch; every one above 0 if wanted."""
        if weights is None:
            self._shares = list(self._counts)
            return
        total = sum(weights)
        self._shares = [
            max(1, round(len(self) * w / total)) if w > 0 else 0
            for w in weights
        ]

    def _try_first_items(self) -> None:
        """Read one item of every dataset, so that mistakes show up now."""
        for reader in self.readers:
            seed_everything(0, self.name)
            results = reader.load(0)
            if results is not None:
                reader.finish(results, keep=True)

    def _rare_class(self, options: Mapping[str, Any] | None
                    ) -> RareClassDraw | None:
        if options is None:
            return None
        check_keys(options, RareClassDraw.OPTIONS,
                   f'streams.{self.name}.rare_class')
        if not all(r.plain for r in self.readers):
            raise ValueError(
                f'`streams.{self.name}.rare_class` cannot look into a '
                'dataset wrapper that makes its own items')
        return RareClassDraw.from_readers(
            self.readers, self._items, self.classes or (), self.name,
            **options)

    # -- drawing ----------------------------------------------------------
    def draw(self, seed: int, position: int, k: int) -> dict:
        """The sample number ``k`` of a position.

        Args:
            seed (int): Seed of the run.
            position (int): Position of the sampler, any size.
            k (int): 0 to ``ratio - 1``.

        Returns:
            dict: ``inputs`` and ``data_samples``.

        Raises:
            ValueError: If a file cannot be used; names it.
        """
        number = position * self.ratio + k
        path = None
        for attempt in range(_MAX_REJECTED):
            seed_everything(seed, self.name, position, k, attempt)
            if self.rare_class is None:
                # a rejected item is replaced by a random one
                item = (self._visit(seed, number) if attempt == 0
                        else np.random.randint(len(self)))
                label = None
            else:
                item, label = self.rare_class.draw()
            reader, index = self._items[item]
            packed = self._read(self.readers[reader], int(index), label)
            if packed is not None:
                packed['data_samples'].set_metainfo(dict(domain=self.name))
                return packed
            path = self.readers[reader].info(int(index)).get('img_path')
        raise ValueError(
            f'stream {self.name!r}: `streams.{self.name}.dataset.pipeline` '
            f'rejected {_MAX_REJECTED} images in a row, the last was {path}')

    def _visit(self, seed: int, number: int) -> int:
        """Which item is the ``number``-th, over epochs of permutations."""
        size = sum(self._shares)
        epoch, offset = divmod(number, size)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            self._epoch = ((seed, epoch), self._plan(seed, epoch))
        return int(self._epoch[1][offset])

    def _plan(self, seed: int, epoch: int) -> np.ndarray:
        """All items of an epoch, shuffled.

        A dataset whose share differs from its length is walked through by
        permutations of its own, which go on from epoch to epoch.
        """
        parts, first = [], 0
        for d, (count, share) in enumerate(
                zip(self._counts, self._shares, strict=True)):
            start, stop = epoch * share, (epoch + 1) * share
            for turn in range(start // count, -(-stop // count)):
                order = permutation(count, seed, self.name, 'items', d, turn)
                low = max(start - turn * count, 0)
                parts.append(first + order[low:stop - turn * count])
            first += count
        plan = np.concatenate(parts)
        if len(self._counts) > 1:
            plan = plan[permutation(
                len(plan), seed, self.name, 'order', epoch)]
        return plan

    def _read(self, reader: Reader, index: int, label: int | None
              ) -> dict | None:
        results = reader.load(index)
        if results is None:
            return None
        rare_class = self.rare_class
        if label is None or rare_class is None:
            return reader.finish(results)
        packed = None
        for _ in range(rare_class.max_recrops + 1):
            packed = reader.finish(results, keep=True)
            if packed is None or rare_class.accepts(
                    packed['data_samples'].gt_sem_seg.data, label):
                break
        return packed


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """The first class in which two lists differ, in words.

    Args:
        ours (sequence[str]): One list of classes.
        theirs (sequence[str]): Another one.

    Returns:
        str: E.g. ``id 3: 'car' and 'vehicle'``, or the two lengths.
    """
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f'id {i}: {a!r} and {b!r}'
    return f'{len(ours)} and {len(theirs)} classes'


def _with_inner(built: list[Any]) -> list[Any]:
    """Datasets and what is inside them, each once."""
    found: list[Any] = []
    for dataset in built:
        for part in [dataset, *inner_datasets(dataset)]:
            if not any(part is known for known in found):
                found.append(part)
    return found
