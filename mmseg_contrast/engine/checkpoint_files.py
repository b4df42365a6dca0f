"""Checkpoints as files: written whole, and checked before they are read."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from ..files import written_whole

#: What mmengine writes the path of the latest checkpoint to.
POINTER = 'last_checkpoint'

#: Name of the backend for ``backend_args``.
WHOLE_FILES = 'mmseg_contrast.whole_files'

_ZIP = b'PK'
_OLD_PICKLE = b'\x80'
_CHUNK = 1 << 20


class WholeFileBackend(LocalBackend):
    """mmengine's local backend, whose files appear at once or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes, and wait until they are on the disk.

        Args:
            obj (bytes): What to write.
            filepath (str or Path): Where to; its folder is made if needed.
        """
        with written_whole(Path(filepath), durable=True) as file:
            file.write(obj)


register_backend(WHOLE_FILES, WholeFileBackend, force=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words.

    All of it is read, and compared with the checksums that torch stores.
    Files of torch before 1.6 have none; of these only the beginning is
    looked at.

    Args:
        path (Path): A file.

    Returns:
        str or None: The end of a sentence such as ``<path> is empty``; None
            if nothing is wrong.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(2)
        if not start:
            return 'is empty'
        if start[:1] == _OLD_PICKLE:
            return None
        if start != _ZIP:
            return 'is no checkpoint'
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as part:
                    while part.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, EOFError, zlib.error):
        return 'is truncated or damaged'
    except OSError as error:
        return f'cannot be read ({error.strerror or error})'
    return None


def to_try(work_dir: Path, folder: Path, template: str) -> list[Path]:
    """Checkpoints to resume from, the best first.

    That is the one that ``last_checkpoint`` names, then those with smaller
    numbers, the largest first. Larger numbers are of an earlier run in the
    same folder, or were written by a process that died before it said so.

    Args:
        work_dir (Path): Where ``last_checkpoint`` is.
        folder (Path): Where checkpoints are, most often the same.
        template (str): Names of checkpoints, such as ``iter_{}.pth``.

    Returns:
        list[Path]: Existing or not; without ``last_checkpoint`` all there
            are.
    """
    before, _, after = template.partition('{}')
    pattern = re.compile(re.escape(before) + r'(\d+)' + re.escape(after))
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            match = pattern.fullmatch(path.name)
            if match:
                found[int(match[1])] = path
    last = _pointed(work_dir, folder)
    match = pattern.fullmatch(last.name) if last else None
    limit = int(match[1]) if match else float('inf')
    older = [found[step] for step in sorted(found, reverse=True)
             if step < limit]
    return older if last is None else [last, *older]


def _pointed(work_dir: Path, folder: Path) -> Path | None:
    """What ``last_checkpoint`` names, also if the folder was moved since."""
    try:
        named = (work_dir / POINTER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not named:
        return None
    here = folder / Path(named).name
    return here if here.exists() else Path(named)
