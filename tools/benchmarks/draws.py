"""Random numbers that are the same in each process."""

from __future__ import annotations

import torch


def generator() -> torch.Generator:
    """Start of all random numbers: they are the same in each process."""
    return torch.Generator().manual_seed(0)
