"""A step count that lives in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Clock(nn.Module):
    """Counts steps; exact after resume, and read without a host sync.

    The buffer is what is saved; a mirror on the host is what is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))
        self._now: int | None = 0

    def now(self) -> int:
        """Steps counted so far."""
        if self._now is None:
            self._now = int(self.count)
        return self._now

    def tick(self) -> None:
        """Count one step."""
        self._now = self.now() + 1
        self.count += 1

    def reset(self) -> None:
        """Start again from 0."""
        self._now = 0
        self.count.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._now = None
