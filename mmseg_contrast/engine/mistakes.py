"""A user's mistake as one sentence instead of a page of traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .finite import NonFiniteError
from .loader import worker_died

DEBUG = 'MMSEG_CONTRAST_DEBUG'


def sentence(error: BaseException) -> str:
    """What went wrong, without the workers' and registries' wrapping.

    Args:
        error (BaseException): An error; one of a loader's worker holds the
            whole traceback in its text.
    """
    text = str(error).strip()
    if 'in DataLoader worker process' in text:
        text = text.splitlines()[-1].partition(': ')[2]
    # mmengine's registry puts the file of the class before the message.
    head, found, rest = text.partition('.py: ')
    if found and head.startswith('class `'):
        return sentence(ValueError(rest))
    return text


@contextmanager
def one_sentence() -> Iterator[None]:
    """Show an expected error as its sentence, and exit with 1.

    That is a ValueError, an error of the disk or a file, a loader's worker
    that died, or what NaNGuardHook found.

    The environment variable ``MMSEG_CONTRAST_DEBUG=1`` shows the traceback.

    Raises:
        SystemExit: Instead of the error.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, NonFiniteError) as error:
        unexpected = isinstance(error, RuntimeError) and not worker_died(error)
        if os.environ.get(DEBUG) or unexpected:
            raise
        print(f'error: {sentence(error)}\n({DEBUG}=1 shows where.)',
              file=sys.stderr)
        raise SystemExit(1) from None
