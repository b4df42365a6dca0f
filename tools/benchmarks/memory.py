"""Peak memory of what is compared, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOOL = Path(__file__).resolve().parents[1] / 'benchmark.py'


def resident(key: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at most.

    Not getrusage: its maximum is inherited from the process that started
    this one.

    Raises:
        RuntimeError: If the system has no /proc.
    """
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError as error:
        raise RuntimeError('Peak memory on the CPU is read from /proc, which '
                           'only Linux has; use --no-memory.') from error
    return next(int(line.split()[1]) * 1024 for line in lines
                if line.startswith(key + ':'))


def peak_above(function: Callable[[], Any], device: str) -> int:
    """Peak bytes while a function runs, less those before.

    On the CPU only the first call of a process tells: memory that was freed
    may stay with the process.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident('VmRSS')
    function()
    return resident('VmHWM') - before


def peak_in_new_process(case: dict[str, Any]) -> int:
    """Peak bytes of a case in a process of its own."""
    case = dict(case, threads=torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, str(TOOL), 'peak', json.dumps(case)],
        capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'Measuring the memory of {case} failed:\n'
                           f'{done.stderr}')
    return int(done.stdout.splitlines()[-1])


def available_memory(device: str) -> int:
    """Bytes that can still be used."""
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines
                    if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
