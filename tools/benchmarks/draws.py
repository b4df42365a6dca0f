"""Random numbers that are the same in each process."""

from __future__ import annotations

import torch
from torch import Tensor


def generator() -> torch.Generator:
    """Start of all random numbers: they are the same in each process."""
    return torch.Generator().manual_seed(0)


def blocks(classes: int, size: tuple[int, int], draw: torch.Generator,
           side: int = 32) -> Tensor:
    """A label map in blocks, each of a random class.

    Args:
        classes (int): C.
        size (tuple[int, int]): Height and width.
        draw (torch.Generator): Of the classes.
        side (int): Of a block, in pixels.

    Returns:
        Tensor: int64, of that size.
    """
    height, width = size
    labels = torch.randint(
        0, classes, (-(-height // side), -(-width // side)), generator=draw)
    return labels.repeat_interleave(side, 0).repeat_interleave(side, 1)[
        :height, :width]
