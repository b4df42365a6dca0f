"""The dataset of a run: named streams, drawn by position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseg.registry import DATASETS

from .checks import check_keys
from .seeding import guarded_random_state
from .stream import Stream, first_difference

_STREAM_KEYS = ('dataset', 'datasets', 'labelled', 'ratio',
                'dataset_weights', 'label_map', 'rare_class', 'cache',
                'pseudo_labels')


@DATASETS.register_module()
class StreamDataset:
    """Several named streams, each with its own datasets.

    An item is asked for by its position, which may grow for ever. All its
    draws (which files, which crops) are a function of ``(seed, position)``
    alone: workers don't matter, ranks have different positions, and a
    resumed run goes on where it stopped. Each stream visits its images in a
    new permutation per epoch.

    Args:
        streams (dict[str, dict]): By name, the options of :class:`Stream`:
            ``dataset`` or ``datasets``, ``labelled``, ``ratio``,
            ``dataset_weights``, ``label_map``, ``rare_class``, ``cache``,
            ``pseudo_labels``.
            The first stream gives the length.
        seed (int): Seed of the draws; :class:`PositionSampler` sets that of
            the run.
        lazy_init (bool): Leave the files for :meth:`full_init`.

    Raises:
        ValueError: For every mistake in config or files that can be seen
            without reading all of them.

    Examples:
        >>> item = dataset[10**9]  # doctest: +SKIP
        >>> item['inputs']['target'].shape  # doctest: +SKIP
        torch.Size([3, 512, 512])
    """

    def __init__(self,
                 streams: Mapping[str, Mapping[str, Any]],
                 seed: int = 0,
                 lazy_init: bool = False) -> None:
        if not streams:
            raise ValueError('`streams` is empty: name at least one stream')
        for name, options in streams.items():
            if '.' in name or 'loss' in name:
                raise ValueError(
                    f'the stream name {name!r} must hold no dot and no '
                    "'loss', because log keys start with it")
            if not isinstance(options, Mapping):
                raise ValueError(
                    f'`streams.{name}` must be a dict, but is {options!r}')
            check_keys(options, _STREAM_KEYS, f'streams.{name}')
        self._options = {n: dict(o) for n, o in streams.items()}
        self.streams: dict[str, Stream] = {}
        self.set_seed(seed)
        if not lazy_init:
            self.full_init()

    def full_init(self) -> None:
        """Build the streams and check all that can be checked."""
        if self.streams:
            return
        with guarded_random_state():
            streams = {
                name: Stream(name, **options)
                for name, options in self._options.items()
            }
        _check_classes(streams)
        self.streams = streams

    def set_seed(self, seed: int) -> None:
        """Change the seed of all draws.

        Args:
            seed (int): The seed.
        """
        self.seed = int(seed)

    @property
    def metainfo(self) -> dict:
        """Classes and palette of the first labelled stream."""
        self.full_init()
        streams = list(self.streams.values())
        chosen = next((s for s in streams if s.labelled), streams[0])
        return dict(classes=chosen.classes, palette=chosen.palette)

    def __len__(self) -> int:
        """Length of the first stream."""
        self.full_init()
        return len(next(iter(self.streams.values())))

    def get_data_info(self, index: int) -> dict:
        """Data info of an image of the first stream.

        Args:
            index (int): Index of the image, not a position.

        Returns:
            dict: What its dataset knows of it.
        """
        self.full_init()
        stream = next(iter(self.streams.values()))
        reader, inner = stream._items[index]
        return stream.readers[reader].info(int(inner))

    def __getitem__(self, position: int) -> dict[str, dict]:
        """The samples of a position.

        Args:
            position (int): From 0 on, without end.

        Returns:
            dict: ``inputs`` (by stream, uint8 BGR ``(3, h, w)``) and
                ``data_samples`` (by stream, ``SegDataSample``); a stream
                with a ratio above 1 has lists of them.

        Raises:
            ValueError: If a file cannot be used; names it.
        """
        self.full_init()
        if position < 0:
            raise IndexError(f'positions start at 0, but got {position}')
        inputs: dict[str, Any] = {}
        samples: dict[str, Any] = {}
        with guarded_random_state():
            for name, stream in self.streams.items():
                drawn = [
                    stream.draw(self.seed, int(position), k)
                    for k in range(stream.ratio)
                ]
                images = [d['inputs'] for d in drawn]
                infos = [d['data_samples'] for d in drawn]
                single = stream.ratio == 1
                inputs[name] = images[0] if single else images
                samples[name] = infos[0] if single else infos
        return dict(inputs=inputs, data_samples=samples)


def _check_classes(streams: Mapping[str, Stream]) -> None:
    first = next((s for s in streams.values()
                  if s.labelled), next(iter(streams.values())))
    for stream in streams.values():
        if stream.classes is None or first.classes is None:
            continue
        if tuple(stream.classes) != tuple(first.classes):
            raise ValueError(
                f'the classes of the streams {first.name!r} and '
                f'{stream.name!r} differ '
                f'({first_difference(first.classes, stream.classes)}): give '
                f'`streams.{stream.name}.label_map` (or that of '
                f'{first.name!r})')
