"""What several commands read from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

SizesT = TypeVar('SizesT')


def add_common(parser: argparse.ArgumentParser) -> None:
    """Device, turns, clock, threads and where results are written."""
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument(
        '--turns', '--repeats', dest='repeats', type=positive, default=9,
        metavar='N', help='how often all is measured, 9')
    parser.add_argument(
        '--clock', default='wall', choices=('wall', 'process'),
        help='time that goes by, or that the processor spends here')
    parser.add_argument(
        '--threads', type=positive, help='of torch on the CPU')
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='write results there')
    parser.add_argument(
        '--sync-check', action='store_true',
        help='first run all once where waiting for the GPU is an error')


def check_common(parser: argparse.ArgumentParser, args: argparse.Namespace
                 ) -> None:
    """Refuse what cannot be measured."""
    device = getattr(args, 'device', 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU, and torch sees none.')
    if device == 'cuda' and args.clock == 'process':
        parser.error('--clock process counts nothing that a GPU does.')
    if getattr(args, 'sync_check', False) and device != 'cuda':
        parser.error('--sync-check needs --device cuda.')


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError('must be at least 1')
    return value


def add_sizes(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Sizes as ``name=value``, see :func:`read_sizes`."""
    parser.add_argument(
        '--sizes', nargs='+', default=[], metavar='NAME=NUMBER',
        help='other sizes than ' + ' '.join(
            f'{one.name}={one.default:g}' for one in fields(kind)))


def read_sizes(pairs: Sequence[str], kind: type[SizesT]) -> SizesT:
    """Sizes from ``name=value``.

    Raises:
        SystemExit: If a name is not known or a value is no number above 0.
    """
    known = {one.name: type(one.default) for one in fields(kind)}
    given = {}
    for pair in pairs:
        name, _, value = pair.partition('=')
        try:
            given[name] = known[name](value)
        except (KeyError, ValueError):
            raise SystemExit(
                f'--sizes {pair} must be name=number with a name out of '
                f'{", ".join(known)}.') from None
        if given[name] <= 0:
            raise SystemExit(f'--sizes {pair} must be above 0.')
    return kind(**given)
