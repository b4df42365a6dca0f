"""An optimizer's step that is left out where something is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor

HOST, SCALER, FUSED, LATE = 'host', 'scaler', 'fused', 'late'


def way_of(optim_wrapper: OptimWrapper, device: torch.device, skip: bool
           ) -> str:
    """How a step can be left out.

    Args:
        optim_wrapper (OptimWrapper): What takes the step.
        device (torch.device): Where the weights are.
        skip (bool): Whether training goes on without it.

    Returns:
        str: 'scaler' and 'fused' leave it out on the device, exactly and
        without a host sync. 'host' waits for the flag, which costs nothing
        on a CPU. 'late' takes the step: the weights are spoilt when the run
        stops, one iteration later.
    """
    scaler = getattr(optim_wrapper, 'loss_scaler', None)
    if scaler is not None and scaler.is_enabled():
        return SCALER
    # What GradScaler asks for, too.
    if getattr(optim_wrapper.optimizer, '_step_supports_amp_scaling', False):
        return FUSED
    return HOST if skip or device.type == 'cpu' else LATE


class SafeStep:
    """Stands for ``optim_wrapper.step`` until it is released.

    Args:
        optim_wrapper (OptimWrapper): What takes the step.
        way (str): See :func:`way_of`.
        ask (Callable): Called before each step, gives the flag: float32
            ``(1,)``, above 0 where the step is to be left out.
        left_out (Callable): Called where the host leaves one out, while
            there still are gradients.
    """

    def __init__(self, optim_wrapper: OptimWrapper, way: str,
                 ask: Callable[[], Tensor],
                 left_out: Callable[[], None]) -> None:
        self.way = way
        self._wrapper = optim_wrapper
        self._step = optim_wrapper.step
        self._ask = ask
        self._left_out = left_out
        optim_wrapper.step = self.step

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose step it is."""
        return self._wrapper.optimizer

    def release(self) -> None:
        """Put the stock step back."""
        del self._wrapper.step

    def step(self, **kwargs: Any) -> None:
        """Take the stock step, or leave it out.

        Args:
            kwargs (Any): For the stock step.
        """
        flag = self._ask()
        if self.way == HOST and bool(flag > 0):
            self._left_out()
            return
        if self.way == SCALER:
            _spoil_one_gradient(self.optimizer, flag)
        if self.way != FUSED:
            self._step(**kwargs)
            return
        # The fused kernels read it on the device, and count no step.
        self.optimizer.found_inf = flag.view(())
        try:
            self._step(**kwargs)
        finally:
            del self.optimizer.found_inf


@torch.no_grad()
def _spoil_one_gradient(optimizer: torch.optim.Optimizer, flag: Tensor
                        ) -> None:
    """The scaler leaves a step out if one number is infinite."""
    for group in optimizer.param_groups:
        for one in group['params']:
            if one.grad is not None:
                first = one.grad[(0, ) * one.grad.dim()]
                first.add_(torch.where(flag[0] > 0, torch.inf, 0.))
                return
