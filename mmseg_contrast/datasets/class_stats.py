"""Pixels per class and image: computed when needed, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.utils import ProgressBar

from ..files import written_whole
from .reader import Reader

_FORMAT = 1
_THREADS = 8


def class_statistics(readers: Sequence[Reader],
                     pairs: np.ndarray,
                     classes: Sequence[str],
                     stream: str,
                     stats_file: str | None = None
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Count the pixels of every class in every label map, or read the cache.

    The cache is a JSON file in ``$MMSEG_CONTRAST_CACHE``, by default
    ``~/.cache/mmseg_contrast``. Its key covers the list of files, their
    sizes and times of change, the loading transforms (label map included)
    and the classes. Rank 0 counts and writes; the others wait for it.

    Args:
        readers (sequence[Reader]): Readers of the datasets.
        pairs (np.ndarray): Reader and index of every item, ``(n, 2)``.
        classes (sequence[str]): The classes, in order of id.
        stream (str): Name of the stream, for the log.
        stats_file (str, optional): Another place for the cache. What lies
            there and does not fit is counted again and replaced.

    Returns:
        tuple[np.ndarray, np.ndarray]: Pixels per class, int64 ``(n, C)``,
            and pixels per image, int64 ``(n,)``.

    Raises:
        ValueError: If a label file cannot be read; on all ranks.
    """
    answer: list = [None]
    if is_main_process():
        try:
            answer[0] = _read_or_count(readers, pairs, classes, stream,
                                       stats_file)
        except ValueError as error:
            # the other ranks wait below: they must get the error as well
            answer[0] = str(error)
    broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def cache_folder() -> Path:
    """Where class statistics are kept.

    Returns:
        Path: ``$MMSEG_CONTRAST_CACHE`` or ``~/.cache/mmseg_contrast``.
    """
    folder = os.environ.get('MMSEG_CONTRAST_CACHE')
    return Path(folder) if folder else Path.home() / '.cache/mmseg_contrast'


def _read_or_count(readers: Sequence[Reader], pairs: np.ndarray,
                   classes: Sequence[str], stream: str,
                   stats_file: str | None) -> tuple[np.ndarray, np.ndarray]:
    key = _key(readers, pairs, classes)
    path = (Path(stats_file) if stats_file else
            cache_folder() / f'class_stats_{key[:16]}.json')
    found = _read(path, key)
    if found is not None:
        return found
    print_log(
        f'counting the pixels per class of stream {stream!r} '
        f'({len(pairs)} label files), kept in {path}',
        logger='current')
    counts, sizes = _count(readers, pairs, len(classes))
    try:
        _write(path, key, classes, counts, sizes)
    except OSError as error:
        print_log(
            f'the class statistics could not be kept in {path} ({error}): '
            'set MMSEG_CONTRAST_CACHE to a folder that can be written',
            logger='current')
    return counts, sizes


def _key(readers: Sequence[Reader], pairs: np.ndarray,
         classes: Sequence[str]) -> str:
    digest = hashlib.sha256()
    digest.update(repr((_FORMAT, tuple(classes))).encode())
    for reader in readers:
        digest.update(repr(reader.loading).encode())
    for number, index in pairs:
        info = readers[number].info(int(index))
        info.pop('sample_idx', None)
        digest.update(repr(sorted(info.items(), key=str)).encode())
        path = info.get('seg_map_path')
        if isinstance(path, str) and os.path.isfile(path):
            state = os.stat(path)
            digest.update(
                repr((state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def _count(readers: Sequence[Reader], pairs: np.ndarray, num_classes: int
           ) -> tuple[np.ndarray, np.ndarray]:
    progress = ProgressBar(len(pairs))

    def one(pair: np.ndarray) -> tuple[np.ndarray, int]:
        labels = readers[pair[0]].load_labels(int(pair[1]))['gt_seg_map']
        counts = np.bincount(labels.reshape(-1), minlength=256)
        return counts[:num_classes], labels.size

    rows = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for row in pool.map(one, pairs):
            rows.append(row)
            progress.update()
    # the bar leaves the cursor in its line
    progress.file.write('\n')
    return (np.stack([r[0] for r in rows]).astype(np.int64),
            np.array([r[1] for r in rows], dtype=np.int64))


def _read(path: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        stored = json.loads(path.read_text())
        if stored['key'] != key:
            return None
        return (np.array(stored['pixels'], dtype=np.int64),
                np.array(stored['sizes'], dtype=np.int64))
    except (OSError, ValueError, KeyError, TypeError):
        # nothing there, or half a file of another program: count again
        return None


def _write(path: Path, key: str, classes: Sequence[str], counts: np.ndarray,
           sizes: np.ndarray) -> None:
    stored = dict(
        key=key,
        classes=list(classes),
        total=dict(zip(classes, counts.sum(axis=0).tolist(), strict=True)),
        pixels=counts.tolist(),
        sizes=sizes.tolist())
    with written_whole(path) as file:
        file.write(json.dumps(stored).encode())
