"""The command loader: samples per second, and of each worker."""

from __future__ import annotations

import argparse
import copy
import logging
import time
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS
from torch.utils.data import DataLoader

from .arguments import add_common, positive
from .report import circumstances, in_words, table, write_json
from .timing import Spread, Timer

#: Batches that each worker has loaded before time is taken.
WARM_UP = 2


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'loader', help="a config's training data, by number of workers")
    parser.set_defaults(run=run_loader)
    parser.add_argument(
        '--config', required=True, metavar='FILE',
        help='its training data must be there')
    parser.add_argument(
        '--workers', nargs='+', type=int, default=[0, 1, 2, 4], metavar='N',
        help='0 is the process that trains; 0 1 2 4')
    parser.add_argument(
        '--batches', type=positive, default=20, metavar='N',
        help='of a turn, 20')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        metavar='KEY=VALUE', help='override settings of the config')
    add_common(parser)


def build_loader(config: Config, dataset: Any, workers: int) -> DataLoader:
    """The config's loader with another number of workers.

    Args:
        config (Config): With ``train_dataloader``.
        dataset (Dataset): What it loads; read once for all loaders.
        workers (int): 0 loads in this process.
    """
    options = copy.deepcopy(dict(config.train_dataloader))
    options.update(dataset=dataset, num_workers=workers,
                   persistent_workers=workers > 0)
    return Runner.build_dataloader(options, seed=0)


def measure(loader: DataLoader, workers: int, batches: int, turns: int
            ) -> dict[str, Any]:
    """Seconds per batch in each turn, after the workers have begun.

    Args:
        loader (DataLoader): Of positions without end.
        workers (int): Its workers.
        batches (int): Of a turn.
        turns (int): How often.
    """
    start = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter() - start
    for _ in range(WARM_UP * max(workers, 1)):
        next(iterator)
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds.append((time.perf_counter() - start) / batches)
    del iterator
    return dict(workers=workers, first=first, seconds=seconds)


def stages(dataset: Any, number: int) -> dict[str, dict[str, float]]:
    """Seconds of a sample of each stream, in this process.

    Args:
        dataset (StreamDataset): The data.
        number (int): Samples of each stream.

    Returns:
        dict: By stream ``load`` (files, decoding, mapped labels, fixed
        resize), ``rest`` (crops, flips, packing) and ``loads`` and
        ``finishes``, how often each ran for a sample.
    """
    found = {}
    for name, stream in dataset.streams.items():
        spent = dict(load=0., rest=0., loads=0., finishes=0.)
        with _watched(stream.readers, spent):
            for position in range(number):
                stream.draw(0, position, 0)
        found[name] = {key: value / number for key, value in spent.items()}
    return found


class _watched:  # noqa: N801  a context manager
    """Adds up how long readers load and finish."""

    def __init__(self, readers: list[Any], spent: dict[str, float]) -> None:
        self.readers = readers
        self.spent = spent

    def __enter__(self) -> None:
        for reader in self.readers:
            reader.load = self._timed(reader.load, 'load', 'loads')
            reader.finish = self._timed(reader.finish, 'rest', 'finishes')

    def __exit__(self, *error: object) -> None:
        for reader in self.readers:
            del reader.load, reader.finish

    def _timed(self, function: Any, seconds: str, calls: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[seconds] += time.perf_counter() - start
            self.spent[calls] += 1
            return result
        return timed


def run_loader(args: argparse.Namespace) -> None:
    """Two tables: stages of a sample, and samples per second."""
    if not Path(args.config).is_file():
        raise SystemExit(f'--config {args.config}: there is no such file.')
    if args.device == 'cuda' or args.clock == 'process':
        raise SystemExit('loader measures the CPU by the wall clock: leave '
                         'out --device and --clock.')
    if min(args.workers) < 0:
        raise SystemExit('--workers must be 0 or above.')
    logging.disable(logging.INFO)
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    init_default_scope(config.get('default_scope', 'mmseg'))
    start = time.perf_counter()
    dataset = DATASETS.build(config.train_dataloader.dataset)
    dataset.full_init() if hasattr(dataset, 'full_init') else None
    built = time.perf_counter() - start
    timer = Timer('cpu', args.repeats, 'wall')
    size = config.train_dataloader.batch_size
    result: dict[str, Any] = dict(
        circumstances(timer, 'opencv-python', 'numpy'), config=args.config,
        batch_size=size, batches=args.batches, built=built)
    print(f'\n{args.config}: batches of {size}; {in_words(result)}. The data '
          f'set was built in {built:.2f} s.\n', flush=True)
    if hasattr(dataset, 'streams'):
        result['stages'] = stages(dataset, args.batches * size)
        print(table(
            ('stream', 'loading, ms', 'the rest, ms', 'loads per sample',
             'crops per sample'),
            [(name, f'{1e3 * one["load"]:.1f}', f'{1e3 * one["rest"]:.1f}',
              f'{one["loads"]:.2f}', f'{one["finishes"]:.2f}')
             for name, one in result['stages'].items()]) + '\n', flush=True)
    result['rows'] = [
        measure(build_loader(config, dataset, workers), workers,
                args.batches, args.repeats) for workers in args.workers]
    print(loader_table(result['rows'], size))
    write_json(args.json, result)


def loader_table(rows: list[dict[str, Any]], size: int) -> str:
    """Of :func:`measure`; a sample is one of each stream."""
    lines = []
    for row in rows:
        speed = Spread.of([size / one for one in row['seconds']])
        lines.append((
            str(row['workers']), f'{row["first"]:.2f}', speed.text(digits=1),
            speed.text(1 / max(row['workers'], 1), 1),
            f'{size / speed.median:.3f}'))
    return table(
        ('workers', 'first batch, s', 'samples per second',
         'of each worker', 'a batch every s'), lines)
