"""Seconds of what is compared, in turns; and where nothing may wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of measured values, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(
            values, n=4, method='inclusive')
        return cls(middle, low, high)

    def text(self, factor: float = 1., digits: int = 2) -> str:
        """As it stands in a table."""
        median, low, high = (f'{factor * one:.{digits}f}' for one in (
            self.median, self.low, self.high))
        return f'{median} ({low}-{high})'


@dataclass(frozen=True)
class Timer:
    """How it is measured.

    Args:
        device (str): 'cpu' or 'cuda'.
        repeats (int): Number of turns.
        clock (str): 'wall', or 'process': the processor's seconds of all
            threads.
    """

    device: str
    repeats: int
    clock: str

    def elapsed(self, function: Callable[[], Any]) -> float:
        """Seconds until the device is done."""
        now = (time.perf_counter if self.clock == 'wall'
               else time.process_time)
        if self.device == 'cuda':
            torch.cuda.synchronize()
        start = now()
        function()
        if self.device == 'cuda':
            torch.cuda.synchronize()
        return now() - start

    def in_turns(self, functions: dict[str, Callable[[], Any]],
                 prepare: Callable[[], Any] | None = None
                 ) -> dict[str, list[float]]:
        """Seconds of each in each turn, after one turn to warm up.

        Args:
            functions (dict): What is measured, by name.
            prepare (Callable, optional): Called before each of them, which
                is not measured.
        """
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(1 + self.repeats):
            for name, function in functions.items():
                if prepare is not None:
                    prepare()
                spent = self.elapsed(function)
                if turn:
                    seconds[name].append(spent)
        return seconds


def ratios(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Spread of the ratios of the turns."""
    return Spread.of([a / b for a, b in zip(times, others, strict=True)])


def forbid_waiting(functions: Iterable[Callable[[], Any]]) -> None:
    """Run each once on a GPU, where waiting for it is an error.

    Raises:
        RuntimeError: By torch, at the first operation that waits.
    """
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        for function in functions:
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')
