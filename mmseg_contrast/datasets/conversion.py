"""Label files of driving data sets: to train ids, verified, restartable."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.fileio import list_dir_or_file
from mmengine.utils import ProgressBar
from PIL import Image

from ..files import written_whole
from .reader import refuse_truncated

IGNORE = 255
NUM_CLASSES = 19
#: List of the good pairs of a data set that has bad ones.
PAIR_LIST = 'pairs.txt'
#: Cityscapes' id -> train id; the other ids are ignored.
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9,
    23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}
#: 255 is the id -1 (license plate) in eight bits.
CITYSCAPES_IDS = (*range(34), 255)


# -- what a data set looks like -------------------------------------------
def read_indices(path: str) -> np.ndarray:
    """Read a PNG of one number per pixel; of a palette image the indices.

    Args:
        path (str): Path of the file.

    Returns:
        np.ndarray: uint8 ``(h, w)``.

    Raises:
        Exception: Of any kind, if the file is damaged or of another format.
    """
    mode = _verified_mode(path)
    if mode not in ('L', 'P'):
        raise ValueError(f'a PNG of mode {mode} has no ids of 8 bits')
    with Image.open(path) as image:
        return np.asarray(image)


def read_first_channel(path: str) -> np.ndarray:
    """Read the first (red) channel of a PNG of three channels of 16 bits.

    Args:
        path (str): Path of the file.

    Returns:
        np.ndarray: uint16 ``(h, w)``.

    Raises:
        Exception: Of any kind, if the file is damaged or of another format.
    """
    mode = _verified_mode(path)
    # Pillow would cut the numbers down to 8 bits; OpenCV gives BGR
    array = cv2.imdecode(
        np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise OSError('cannot be decoded')
    if array.dtype != np.uint16 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f'a PNG of mode {mode} and {array.dtype} is none of 3 channels '
            'of 16 bits')
    return np.ascontiguousarray(array[:, :, 2])


def _verified_mode(path: str) -> str:
    """Pillow's mode of a PNG whose chunks are all there and whole."""
    with Image.open(path, formats=['PNG']) as image:
        mode = image.mode
        image.verify()
    return mode


@dataclass(frozen=True)
class LabelFormat:
    """How the label files of a data set are named and what is in them.

    Args:
        suffix (str): End of the names of the original files.
        output_suffix (str): End of the names of the files with train ids.
        train_ids (mapping[int, int]): Train id of an id. The known ids that
            are not in it become 255.
        known_ids (collection[int]): All ids an original may hold.
        read (callable): Gives the ids, ``(h, w)``, of a path.
        shipped (bool): Whether the data set comes with train ids. Where they
            are there, they are checked by themselves, not compared with the
            originals.
    """

    suffix: str
    output_suffix: str
    train_ids: Mapping[int, int]
    known_ids: Collection[int]
    read: Callable[[str], np.ndarray] = read_indices
    shipped: bool = False

    def to_train_ids(self, ids: np.ndarray) -> np.ndarray:
        """Map the ids of an original file.

        Args:
            ids (np.ndarray): Ids, uint8 or uint16 ``(h, w)``.

        Returns:
            np.ndarray: Train ids, uint8 ``(h, w)``, 255 where ignored.

        Raises:
            ValueError: If there is an unknown id.
        """
        present = np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
        unknown = [i for i in present if i not in self.known_ids]
        if unknown:
            raise ValueError(f'holds unknown ids, the first is {unknown[0]}')
        table = np.full(present[-1] + 1, IGNORE, dtype=np.uint8)
        for original, train_id in self.train_ids.items():
            if original < len(table):
                table[original] = train_id
        return table[ids]


@dataclass(frozen=True)
class Part:
    """A folder of images and the one of their labels, below the root.

    Args:
        images (str): Folder of the images, searched with all below it.
        labels (str, optional): Folder of the labels, with the same folders
            below it. None: the images have no labels.
        image_suffix (str): End of the names of images.
        note (str): What to tell the user of this part.
    """

    images: str
    labels: str | None
    image_suffix: str = '.png'
    note: str = ''


# -- one pair -------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """The files of one image.

    Args:
        stem (str): Their common name, relative to the folders of the part.
        image (str, optional): The image; None if there is none.
        original (str, optional): Its original label file.
        shipped (str, optional): Train ids that are checked by themselves.
        output (str, optional): Where its train ids go; None for an image
            that has no labels.
    """

    stem: str
    image: str | None
    original: str | None
    shipped: str | None
    output: str | None


@dataclass(frozen=True)
class Outcome:
    """What became of a pair.

    Args:
        kind (str): One of the keys of ``KINDS``.
        stem (str): The stem of the pair.
        message (str): What is wrong, with the file's name.
    """

    kind: str
    stem: str
    message: str = ''


#: The kinds of outcomes in the order of the summary.
KINDS = dict(
    written='label files written',
    kept='already there and right',
    checked='shipped label files right',
    image='images without labels right',
    mismatch='of another size than their image',
    problem='problems')
_GOOD = ('written', 'kept', 'checked')


class _Wrong(Exception):
    """A file that cannot be used; its arguments are kind and message."""


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    # Pillow, OpenCV and zlib report damage by a dozen kinds of errors
    except Exception as error:
        kind = type(error)
        name = '' if kind is ValueError else f'{kind.__name__}, '
        raise _Wrong('problem', f'{path}: {name}{error}') from error


def handle(pair: Pair, labels: LabelFormat, dry_run: bool = False) -> Outcome:
    """Verify a pair and write its train ids, if they are not there yet.

    Nothing that exists is ever overwritten.

    Args:
        pair (Pair): Its files.
        labels (LabelFormat): The format of its labels.
        dry_run (bool): Verify, but write nothing.

    Returns:
        Outcome: What became of it.

    Raises:
        ValueError: If the output cannot be written.
    """
    try:
        kind, train_ids = _verify(pair, labels)
    except _Wrong as wrong:
        return Outcome(wrong.args[0], pair.stem, wrong.args[1])
    if kind == 'written' and not dry_run:
        assert pair.output is not None and train_ids is not None
        write_png(pair.output, train_ids)
    return Outcome(kind, pair.stem)


def _verify(pair: Pair, labels: LabelFormat
            ) -> tuple[str, np.ndarray | None]:
    """Kind of outcome and, if they are to be written, the train ids."""
    if pair.image is None:
        raise _Wrong('problem',
                     f'{pair.original or pair.shipped}: has no image')
    with _naming(pair.image):
        refuse_truncated(pair.image)
        with Image.open(pair.image) as image:
            width, height = image.size
    if pair.output is None:
        return 'image', None
    source = pair.shipped or pair.original
    if source is None:
        raise _Wrong('problem', f'{pair.image}: has no label file')
    with _naming(source):
        if pair.shipped:
            train_ids = _read_train_ids(source)
        else:
            train_ids = labels.to_train_ids(labels.read(source))
    if train_ids.shape != (height, width):
        raise _Wrong(
            'mismatch', f'{source}: {train_ids.shape[1]} x '
            f'{train_ids.shape[0]} pixels, but {pair.image} has {width} x '
            f'{height}')
    if pair.shipped:
        return 'checked', None
    if not os.path.lexists(pair.output):
        return 'written', train_ids
    with _naming(pair.output):
        there = read_indices(pair.output)
        if not np.array_equal(there, train_ids):
            raise ValueError(
                f'is not what {source} gives; nothing is overwritten, so '
                'move it away and run again')
    return 'kept', None


def _read_train_ids(path: str) -> np.ndarray:
    ids = read_indices(path)
    wrong = ids[(ids >= NUM_CLASSES) & (ids != IGNORE)]
    if wrong.size:
        raise ValueError(
            f'holds {int(wrong[0])}, which is no train id (0 to '
            f'{NUM_CLASSES - 1} and {IGNORE})')
    return ids


def write_png(path: str, labels: np.ndarray) -> None:
    """Write a label map, whole or not at all.

    Args:
        path (str): Path of the PNG; its folder is made.
        labels (np.ndarray): uint8 ``(h, w)``.

    Raises:
        ValueError: If it cannot be written.
    """
    _write(path, cv2.imencode('.png', labels)[1].tobytes())


def _write(path: str, content: bytes) -> None:
    try:
        with written_whole(Path(path)) as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f'cannot write {path} ({error})') from error


# -- all pairs ------------------------------------------------------------
def find_pairs(root: str, parts: Sequence[Part], labels: LabelFormat,
               out_dir: str | None = None) -> list[Pair]:
    """List the files of a data set.

    Args:
        root (str): Folder of the data set.
        parts (sequence[Part]): Its parts; those with no folder are skipped.
        labels (LabelFormat): The format of its labels.
        out_dir (str, optional): Folder of the outputs. None: ``root``.

    Returns:
        list[Pair]: Everything that is there, also what lacks its other half.

    Raises:
        ValueError: If the folder is not that of the data set.
    """
    pairs: list[Pair] = []
    for part in _parts_there(root, parts):
        images = _stems(os.path.join(root, part.images), part.image_suffix)
        if part.labels is None:
            pairs += [Pair(stem, path, None, None, None)
                      for stem, path in sorted(images.items())]
            continue
        folder = os.path.join(root, part.labels)
        target = os.path.join(out_dir or root, part.labels)
        if out_dir:
            _refuse_inside(out_dir, [os.path.join(root, part.images), folder])
        outputs = _stems(folder, labels.output_suffix)
        originals = _stems(folder, labels.suffix, labels.output_suffix)
        shipped = {stem: path for stem, path in outputs.items()
                   if labels.shipped or stem not in originals}
        for stem in sorted({*images, *originals, *shipped}):
            pairs.append(Pair(
                stem, images.get(stem), originals.get(stem),
                shipped.get(stem),
                os.path.join(target, stem + labels.output_suffix)))
    if not pairs:
        raise ValueError(
            f'{os.path.join(root, parts[0].images)} holds no file '
            f'*{parts[0].image_suffix}')
    return pairs


def _stems(folder: str, suffix: str, excluded: str | None = None
           ) -> dict[str, str]:
    """Paths of the files in a folder, by name without the suffix."""
    return {
        name[:-len(suffix)]: os.path.join(folder, name)
        for name in list_dir_or_file(
            folder, list_dir=False, suffix=suffix, recursive=True)
        if excluded is None or not name.endswith(excluded)
    }


def _parts_there(root: str, parts: Sequence[Part]) -> list[Part]:
    if not os.path.isdir(root):
        raise ValueError(f'the folder {root} does not exist')
    found = []
    for part in parts:
        folders = [f for f in (part.images, part.labels) if f is not None]
        missing = [f for f in folders
                   if not os.path.isdir(os.path.join(root, f))]
        if not missing:
            found.append(part)
        elif len(missing) < len(folders):
            there = next(f for f in folders if f not in missing)
            raise ValueError(
                f'{os.path.join(root, there)} is there, but not '
                f'{os.path.join(root, missing[0])}')
    if not found:
        wanted = ' and '.join(f for f in (parts[0].images, parts[0].labels)
                              if f is not None)
        raise ValueError(
            f'{root} does not hold {wanted}{_one_below(root, parts)}')
    return found


def _one_below(root: str, parts: Sequence[Part]) -> str:
    """A hint for archives that were unpacked one folder too deep."""
    for name in sorted(os.listdir(root)):
        inner = os.path.join(root, name)
        if any(os.path.isdir(os.path.join(inner, p.images)) for p in parts):
            return f'; did you mean {inner}?'
    return ': give the folder that does'


def _refuse_inside(out_dir: str, folders: Sequence[str]) -> None:
    inside = os.path.join(os.path.realpath(out_dir), '')
    for folder in folders:
        if inside.startswith(os.path.join(os.path.realpath(folder), '')):
            raise ValueError(
                f'--out-dir {out_dir} lies inside of {folder}: choose a '
                'folder outside of the original files')


def _remove_leftovers(pairs: Sequence[Pair], suffix: str) -> None:
    """Remove what killed runs left behind."""
    for folder in {os.path.dirname(p.output) for p in pairs if p.output}:
        if not os.path.isdir(folder):
            continue
        for entry in list(os.scandir(folder)):
            if (entry.name.startswith('.') and suffix in entry.name
                    and entry.name.endswith('.tmp')):
                os.unlink(entry.path)


def _start_worker() -> None:
    # Ctrl-C reaches all processes; the main one stops the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a killed main process stops nobody: its workers would wait for ever
    threading.Thread(
        target=_die_with, args=(os.getppid(), ), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, a second one raises.

    An exception at any point inside of the pool can leave it waiting for
    ever.
    """
    noted = threading.Event()

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.getsignal(signal.SIGINT)
    if (before is not signal.default_int_handler
            or threading.current_thread() is not threading.main_thread()):
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _handle_all(pairs: Sequence[Pair], labels: LabelFormat, nproc: int,
                dry_run: bool) -> Iterator[Outcome]:
    work = partial(handle, labels=labels, dry_run=dry_run)
    if nproc == 1:
        yield from map(work, pairs)
        return
    with _interrupt_noted() as interrupt, ProcessPoolExecutor(
            nproc, initializer=_start_worker) as pool:
        try:
            for outcome in pool.map(work, pairs, chunksize=4):
                if interrupt.is_set():
                    raise KeyboardInterrupt
                yield outcome
        except BrokenProcessPool as error:
            raise ValueError(
                'a worker process was killed, perhaps for lack of memory: '
                'the same command goes on, try a smaller --nproc') from error


def convert(root: str,
            parts: Sequence[Part],
            labels: LabelFormat,
            out_dir: str | None = None,
            nproc: int = 4,
            dry_run: bool = False,
            list_good: bool = False) -> int:
    """Verify a data set and write the train ids that are missing.

    Originals are only read, what exists is never overwritten, and a file
    appears under its name when it is whole: the same call goes on where a
    killed one stopped. A file that is there already is compared with what
    its original gives. Every bad file gets a line on stderr.

    Args:
        root (str): Folder of the data set.
        parts (sequence[Part]): Its parts.
        labels (LabelFormat): The format of its labels.
        out_dir (str, optional): Write below this folder instead of beside
            the originals.
        nproc (int): Number of processes.
        dry_run (bool): Verify, but write nothing.
        list_good (bool): For a data set with pairs of different sizes in the
            release: list the stems of the others in ``pairs.txt``, and do
            not count these as problems.

    Returns:
        int: Exit status: 0 if all is well, 1 if there are problems, 130 if
            it was interrupted.

    Raises:
        ValueError: If ``root`` is not the folder of the data set, an option
            is wrong or an output cannot be written.
    """
    if nproc < 1:
        raise ValueError(f'--nproc must be at least 1, but is {nproc}')
    pairs = find_pairs(root, parts, labels, out_dir)
    for part in parts:
        if part.note and os.path.isdir(os.path.join(root, part.images)):
            print(part.note)
    if not dry_run:
        _remove_leftovers(pairs, labels.output_suffix)
    progress = ProgressBar(len(pairs), file=sys.stdout)
    outcomes = []
    try:
        for outcome in _handle_all(pairs, labels, nproc, dry_run):
            outcomes.append(outcome)
            # a hundred lines in a log, however many files
            done = len(outcomes) * 100 // len(pairs) * len(pairs) // 100
            if done > progress.completed:
                progress.update(done - progress.completed)
    except KeyboardInterrupt:
        print('\ninterrupted: the same command goes on', file=sys.stderr)
        return 130
    # the bar leaves the cursor in its line
    progress.file.write('\n')
    if list_good and not dry_run:
        good = sorted(o.stem for o in outcomes if o.kind in _GOOD)
        _write(os.path.join(out_dir or root, PAIR_LIST),
               ''.join(f'{stem}\n' for stem in good).encode())
    return _report(root, outcomes, dry_run, list_good)


def _report(root: str, outcomes: Sequence[Outcome], dry_run: bool,
            list_good: bool) -> int:
    for outcome in outcomes:
        if outcome.message:
            print(outcome.message, file=sys.stderr)
    counts = Counter(o.kind for o in outcomes)
    texts = dict(KINDS, written='label files to write') if dry_run else KINDS
    words = [f'{counts[kind]} {text}' for kind, text in texts.items()
             if counts[kind] or kind == 'problem']
    print(f'{root}{" (dry run)" if dry_run else ""}: {", ".join(words)}')
    if list_good and counts['mismatch'] and not dry_run:
        print(f'{PAIR_LIST} lists the pairs of one size')
    bad = counts['problem'] + (0 if list_good else counts['mismatch'])
    return 1 if bad else 0


def argument_parser(description: str | None, default_root: str
                    ) -> argparse.ArgumentParser:
    """The command line that all converters share.

    Args:
        description (str, optional): What the data set looks like.
        default_root (str): Where it is expected.

    Returns:
        ArgumentParser: With ``root``, ``out_dir``, ``nproc``, ``dry_run``.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'root', nargs='?', default=default_root,
        help='folder of the data set (default: %(default)s)')
    parser.add_argument(
        '--out-dir',
        help='write below this folder instead of beside the originals')
    parser.add_argument(
        '--nproc', type=int, default=4,
        help='number of processes (default: %(default)s)')
    parser.add_argument(
        '--dry-run', action='store_true',
        help='verify everything, write nothing')
    return parser
