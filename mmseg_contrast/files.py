"""Files that appear at once or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Write a file under a hidden name, which it loses when it is complete.

    A reader sees the old file or the whole new one; an error leaves none.
    A killed process leaves ``.<name>.*.tmp`` behind.

    Args:
        path (Path): The file; its folder is made if needed.
        durable (bool): Wait until it is on the disk. Else a machine that
            loses power may keep the new name and lose the content.

    Yields:
        BinaryIO: The file to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp's file is for its owner alone.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def left_behind(path: Path) -> list[Path]:
    """What killed writers of a file have left of it.

    Args:
        path (Path): The file; ``*`` in its name stands for anything.
    """
    return sorted(path.parent.glob(f'.{path.name}.*.tmp'))


def _sync_folder(folder: Path) -> None:
    """Make a renaming last; some file systems can't, and need not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
