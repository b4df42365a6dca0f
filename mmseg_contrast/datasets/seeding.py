"""Randomness as a function of position: seeds, permutations, saved states."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info

_WORD = 2**32


def seed_sequence(*parts: int | str) -> np.random.SeedSequence:
    """A seed made of several numbers and names, the same on every machine.

    Args:
        *parts (int or str): What the seed depends on. Names are hashed by
            CRC-32: Python's own ``hash`` differs from process to process.

    Returns:
        np.random.SeedSequence: The seed; two words for every part, so that
            no two lists of parts of the same length collide by carry.
    """
    words: list[int] = []
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        words += [int(number) % _WORD, int(number) // _WORD % _WORD]
    return np.random.SeedSequence(words)


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """A seeded permutation of ``range(size)``.

    Args:
        size (int): Number of elements.
        *parts (int or str): What it depends on, see :func:`seed_sequence`.

    Returns:
        np.ndarray: Indices, int64, ``(size,)``.
    """
    state = np.random.RandomState(seed_sequence(*parts).generate_state(4))
    return state.permutation(size)


def seed_everything(*parts: int | str) -> None:
    """Seed ``random``, ``numpy.random`` and torch's CPU generator.

    torch's accelerator generators are left alone: a dataset in the main
    process must not change what the model draws there.

    Args:
        *parts (int or str): What the seed depends on.
    """
    words = seed_sequence(*parts).generate_state(8)
    random.seed(int(words[0]) * _WORD + int(words[1]))
    np.random.seed(words[2:6])
    torch.default_generator.manual_seed(
        int(words[6] >> 1) * _WORD + int(words[7]))


@contextmanager
def guarded_random_state() -> Iterator[None]:
    """Give the global random states back as they were, in the main process.

    A worker process has no other user of them, so nothing is saved there.
    """
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
