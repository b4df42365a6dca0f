"""tools/benchmark.py and its modules, imported as the script does it."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_before = list(sys.path)
sys.path.insert(0, str(ROOT / 'tools'))
try:
    import benchmark
    from benchmarks import (
        arguments,
        backbone,
        class_statistics,
        contrast,
        contrast_step,
        cut,
        kernel,
        loader,
        memory,
        pieces,
        step,
        timing,
        training,
        update,
    )
finally:
    sys.path[:] = _before

__all__ = [
    'arguments', 'backbone', 'benchmark', 'call', 'class_statistics',
    'columns', 'contrast', 'contrast_step', 'cut', 'kernel', 'loader',
    'memory', 'pieces', 'step', 'timing', 'training', 'update'
]


def call(monkeypatch, *args):
    """Run the tool with these arguments."""
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *map(str, args)])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)


def columns(line):
    """Cells of a table's row."""
    return [one.strip() for one in line.strip('|\n').split('|')]
