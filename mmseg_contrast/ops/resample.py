"""Maps at the crossings of rows and columns, by matrix products.

As torch's bilinear resizing, but at any places, such as those of the whole
image's grid inside a crop of it; its gradient is deterministic on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centres(number: int, length: int, device: torch.device | None = None
            ) -> Tensor:
    """Middles of equal cells along a side.

    Args:
        number (int): Of cells.
        length (int): Of the side, in pixels.
        device (torch.device, optional): Where to put them.

    Returns:
        Tensor: In pixels, float32, ``(number,)``.
    """
    cells = torch.arange(number, device=device, dtype=torch.float32)
    return (cells + 0.5) * (length / number)


def bilinear_at(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values of maps; beyond the border those of the border.

    With the centres of a grid it equals ``F.interpolate(mode='bilinear',
    align_corners=False)``.

    Args:
        maps (Tensor): ``(N, D, h, w)``.
        rows (Tensor): Vertical places as shares of the side, from 0, the
            upper edge, to 1, the lower edge, ``(r,)``; ``(N, r)`` if they
            differ from map to map.
        columns (Tensor): Horizontal ones, ``(c,)`` or ``(N, c)``.

    Returns:
        Tensor: ``(N, D, r, c)``, float32 or wider.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    height, width = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):
        down, right = (_tents(places.to(dtype), side) for places, side in (
            (rows, height), (columns, width)))
        # Columns first: what is written is smaller than what is read.
        return down @ (maps.to(dtype) @ right.mT)


def _tents(places: Tensor, side: int) -> Tensor:
    """Shares of each cell in each place, ``(n, side)``, ``(N, 1, n, side)``.

    Args:
        places (Tensor): ``(n,)`` or ``(N, n)``.
        side (int): Number of cells.
    """
    cells = (places * side - 0.5).clamp(0, side - 1)
    number = torch.arange(side, device=places.device, dtype=places.dtype)
    shares = (1 - (cells.unsqueeze(-1) - number).abs()).clamp_min(0)
    return shares if places.dim() == 1 else shares.unsqueeze(1)
