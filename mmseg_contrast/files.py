"""Files that appear at once or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a hidden name, which it loses when it is complete.

    A reader sees the old file or the whole new one; an error leaves none.
    A killed process leaves ``.<name>.*.tmp`` behind.

    Args:
        path (Path): The file; its folder is made if needed.

    Yields:
        BinaryIO: The file to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
        # mkstemp's file is for its owner alone.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
