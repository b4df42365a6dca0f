"""The train loop's iterator: goes on at the position of the run."""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mmengine.logging import print_log
from torch.utils.data import DataLoader

_TORCH = 'torch.utils.data._utils.signal_handling'
_DEAD = 'DataLoader worker (pid'
#: So many dead workers in so many batches are no accident.
RESTARTS, BATCHES = 3, 1000


def worker_died(error: BaseException) -> bool:
    """Whether torch says that a loader's process is gone.

    Args:
        error (BaseException): Any.
    """
    return isinstance(error, RuntimeError) and _DEAD in str(error)


class PositionedIterator:
    """Stands for the loop's iterator over a loader drawn by position.

    A worker process that was killed (out of memory; SIGTERM to a whole job)
    is replaced: draws are a function of the position, so the samples are the
    same as if it had lived.

    Args:
        loader (DataLoader): With a :class:`PositionSampler`.
        replaced (Iterator): The loop's own iterator.
        sampler (PositionSampler): The loader's.
        samples (Callable): Samples of this rank consumed by the run so far.
        resumed (bool): Whether the loader must be moved first.
        ignored (int): Calls that stock mmengine makes to skip samples; they
            give None.
    """

    def __init__(self, loader: DataLoader, replaced: Any, sampler: Any,
                 samples: Callable[[], int], resumed: bool,
                 ignored: int = 0) -> None:
        self._loader = loader
        self._sampler = sampler
        self._samples = samples
        self._ignored = ignored
        self._batches = 0
        self._deaths: deque[int] = deque(maxlen=RESTARTS)
        self._iterator: Iterator = replaced
        if resumed:
            self._move()

    def __iter__(self) -> PositionedIterator:
        return self

    def __next__(self) -> Any:
        if self._ignored > 0:
            self._ignored -= 1
            return None
        while True:
            try:
                with _deaths.noticed():
                    batch = next(self._iterator)
            except (RuntimeError, ConnectionError, EOFError) as error:
                # A sample may be on its way when its sender dies.
                if isinstance(error, RuntimeError) and not worker_died(error):
                    raise
                self._restart(error)
                continue
            self._batches += 1
            return batch

    def skip_iter(self, num_iters: int) -> None:
        """Do nothing: the sampler is there already.

        Args:
            num_iters (int): Ignored.
        """

    def _restart(self, error: Exception) -> None:
        if len(self._deaths) == RESTARTS and (
                self._batches - self._deaths[0] < BATCHES):
            raise RuntimeError(
                f'{error} It is number {RESTARTS + 1} in {BATCHES} '
                'iterations: reduce train_dataloader.num_workers or turn off '
                '`cache` of the streams if memory is short (the kernel logs '
                'whom it kills), enlarge /dev/shm if it was a bus error, and '
                'go on with --resume.') from error
        self._deaths.append(self._batches)
        print_log(
            f'{error} New workers go on with the same samples.',
            logger='current', level=logging.WARNING)
        self._move()

    def _move(self) -> None:
        stop_workers(self._loader, self._iterator)
        self._sampler.skip(self._samples())
        self._iterator = _Lazy(self._loader)


class _Lazy:
    """An iterator that starts its workers with the first sample."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._iterator: Iterator | None = None

    def __iter__(self) -> _Lazy:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)


def stop_workers(loader: DataLoader, iterator: Any) -> None:
    """End workers that load from an old position and seed.

    Persistent workers hold a copy of the dataset, so they would keep its old
    seed; the loader must start new ones.

    Args:
        loader (DataLoader): Theirs.
        iterator (Iterator): mmengine's, or one of ours.
    """
    while iterator is not None:
        stop = getattr(iterator, '_shutdown_workers', None)
        if stop is not None:
            stop()
        below = getattr(iterator, '_iterator', None)
        if below is not None:
            iterator._iterator = None
        iterator = below
    if getattr(loader, '_iterator', None) is not None:
        loader._iterator = None


class _Deaths:
    """Lets torch speak of dead workers only while samples are waited for.

    torch raises in its handler of SIGCHLD, that is anywhere: in the middle
    of a step, or while a checkpoint is written.
    """

    def __init__(self) -> None:
        self._torch: Callable | None = None
        self._waiting = self._pending = False

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """A context in which a death, also an earlier one, is an error."""
        self._take_over()
        self._waiting = True
        try:
            if self._pending:
                self(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False
            # The first sample starts the workers, and with them the handler.
            self._take_over()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._pending = not self._waiting
        if self._waiting and self._torch is not None:
            self._torch(number, frame)

    def _take_over(self) -> None:
        if not hasattr(signal, 'SIGCHLD') or (
                threading.current_thread() is not threading.main_thread()):
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and getattr(
                handler, '__module__', None) == _TORCH:
            self._torch = handler
            signal.signal(signal.SIGCHLD, self)


_deaths = _Deaths()
