"""What the host sends to a device."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes that CUDA takes from any memory without waiting.
WITHOUT_PINNING = 2**16


def send(values: Tensor, device: torch.device | str) -> Tensor:
    """Values on a device, without waiting for it.

    CUDA copies what is larger than 64 KiB from pinned memory alone without
    waiting for all that it was told to do before. PyTorch keeps pinned memory
    for the next time, and knows when the copy is done.

    Args:
        values (Tensor): Of the host, or there already.
        device (torch.device or str): Where to.

    Returns:
        Tensor: The same values there.
    """
    device = torch.device(device)
    if device.type == 'cuda' and values.device.type == 'cpu' and (
            values.nbytes > WITHOUT_PINNING) and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
