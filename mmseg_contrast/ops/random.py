"""Randomness as a function of position.

Every stochastic part has a generator of its own, seeded by what it is and
where training stands. So adding one part never changes the draws of another,
ranks differ, and a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def position_seed(*keys: int | str) -> int:
    """A 63-bit seed from integers and names, equal on every machine.

    Args:
        *keys: Integers of any size, and strings.

    Returns:
        int: Seed in ``[0, 2**63)``.
    """
    text = '/'.join(f'{type(k).__name__}:{k}' for k in keys).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def generator_at(*keys: int | str) -> torch.Generator:
    """A fresh CPU generator for one place and moment.

    Draws are made on the CPU and the few numbers are sent to the device
    without waiting: this costs no host sync, and CPU and GPU runs draw alike.
    """
    return torch.Generator().manual_seed(position_seed(*keys))


@contextmanager
def forked_rng(device: torch.device, *keys: int | str) -> Iterator[None]:
    """Seed torch's default generators inside the block, restore them after.

    For code that draws from the default generators, as dropout and
    stochastic depth do.

    Args:
        device (torch.device): Where the code inside runs.
        *keys: See :func:`position_seed`.
    """
    # Not torch.manual_seed: it seeds all devices, and takes a thousand times
    # as long as the generators themselves.
    generators = [torch.default_generator]
    if device.type == 'cuda':
        index = device.index
        if index is None:
            index = torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(position_seed(*keys))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
