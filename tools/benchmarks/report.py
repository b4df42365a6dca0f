"""Tables, targets and files of what was measured."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .timing import Timer


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def mebibytes(size: int | None) -> str:
    """Of a number of bytes."""
    return '-' if size is None else f'{size / 2**20:.0f}'


def number(value: float | None) -> str:
    """With two digits, where there is one."""
    return '-' if value is None else f'{value:.2f}'


def judge(targets: list[dict[str, Any]]) -> None:
    """Say of each whether it was met."""
    for one in targets:
        one['met'] = (one['reached'] <= one['target'] if one['most']
                      else one['reached'] >= one['target'])


def table_of_targets(targets: list[dict[str, Any]]) -> str:
    """Of :func:`judge`."""
    return table(
        ('what', 'target', 'reached', ''),
        [(one['what'],
          ('at most ' if one['most'] else 'at least ') + f'{one["target"]:g}',
          f'{one["reached"]:.3g}', 'met' if one['met'] else 'missed')
         for one in targets])


def circumstances(timer: Timer, *libraries: str) -> dict[str, Any]:
    """What numbers depend on: device, turns, clock, threads and versions.

    Args:
        timer (Timer): How it is measured.
        *libraries (str): Distributions besides Python and torch; their
            version is None if they are missing.
    """
    versions: dict[str, str | None] = dict(
        python=platform.python_version(), torch=torch.__version__)
    for name in libraries:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return dict(asdict(timer), threads=torch.get_num_threads(),
                versions=versions)


def in_words(result: dict[str, Any]) -> str:
    """Of :func:`circumstances`."""
    return (f'{result["device"]}, {result["threads"]} threads, '
            f'{result["repeats"]} turns, {result["clock"]} clock')


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write results, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + '\n')
