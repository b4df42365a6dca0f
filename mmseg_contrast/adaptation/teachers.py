"""Teachers: models that label what has no labels, and are never trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import annealed_alpha, ema_update
from .clock import Clock
from .students import class_probabilities
from .view import View


@MODELS.register_module()
class EMATeacher(nn.Module):
    """Exponential moving average of the student (Mean Teacher).

    Tarvainen and Valpola, 2017, with the annealing of DACS and DAFormer:
    ``alpha_t = min(1 - 1 / (t + 1), alpha)``, updated at the start of each
    iteration (with gradient accumulation: of each micro-step); the first
    update is a copy. Dropout and stochastic depth are off.

    Args:
        student (nn.Module): The segmentor to copy.
        alpha (float): Final momentum, in [0, 1).
        batch_norm (str): 'batch' normalises with the statistics of the batch
            and records its own running ones, as the published code does;
            'ema' normalises with a moving average of the student's running
            statistics.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 student: nn.Module,
                 alpha: float = 0.999,
                 batch_norm: str = 'batch') -> None:
        super().__init__()
        if not 0 <= alpha < 1:
            raise ValueError(
                f'model.teachers.*.alpha must lie in [0, 1), got {alpha}.')
        if batch_norm not in ('batch', 'ema'):
            raise ValueError(
                "model.teachers.*.batch_norm must be 'batch' or 'ema', got "
                f'{batch_norm!r}.')
        self.alpha = alpha
        self.batch_norm = batch_norm
        self.steps = Clock()
        self.model = copy.deepcopy(student).requires_grad_(False)
        self._mode: bool | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None
        self.train(False)

    def init_weights(self) -> None:
        """Nothing: the first update copies the student."""

    def train(self, mode: bool = True) -> EMATeacher:
        """Everything stays in evaluation mode, batch norm as asked for."""
        self.training = mode
        if self._mode is mode:
            return self
        self._mode = mode
        self.model.eval()
        if mode and self.batch_norm == 'batch':
            # Looked up now: Runner may have replaced SyncBN since.
            for part in self.model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.train()
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> EMATeacher:
        self._pairs = None
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def update(self, student: nn.Module) -> float:
        """Move towards the student.

        Args:
            student (nn.Module): The segmentor of the same structure.

        Returns:
            float: The momentum used.
        """
        step = self.steps.now()
        alpha = annealed_alpha(step, self.alpha)
        if self._pairs is None:
            self._pairs = (list(self.model.parameters()),
                           list(student.parameters()))
        ema_update(*self._pairs, alpha)
        if self.batch_norm == 'ema':
            self._average_buffers(student, alpha)
        self.steps.tick()
        return alpha

    def _average_buffers(self, student: nn.Module, alpha: float) -> None:
        mine, theirs = list(self.model.buffers()), list(student.buffers())
        pairs = list(zip(mine, theirs, strict=True))
        real = [pair for pair in pairs if pair[0].is_floating_point()]
        ema_update([m for m, _ in real], [s for _, s in real], alpha)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)

    @torch.no_grad()
    def predict(self, view: View) -> Tensor:
        """Class probabilities for a view.

        Args:
            view (View): Images ``(N, 3, H, W)``.

        Returns:
            Tensor: float32, ``(N, C, H, W)``.
        """
        return class_probabilities(self.model, view.images)
