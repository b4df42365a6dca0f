"""Teachers: models that label what has no labels, and are never trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models import Clock
from ..ops import annealed_alpha, ema_update
from .students import StudentAdapter, StudentOutput, class_probabilities
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
        _leave_out(self.model)
        self._adapter: StudentAdapter | None = None
        self._mode: bool | None = None
        self._tensors: _Tensors | None = None
        self.train(False)

    def init_weights(self) -> None:
        """Nothing: the first update copies the student."""

    def train(self, mode: bool = True) -> EMATeacher:
        """Everything stays in evaluation mode, batch norm as asked for.

        Norms that the student itself holds in evaluation mode
        (``norm_eval``, frozen stages) stay so.
        """
        self.training = mode
        if self._mode is mode:
            return self
        self._mode = mode
        recording = mode and self.batch_norm == 'batch'
        self.model.train(recording)
        if recording:
            # Looked up now: Runner may have replaced SyncBN since.
            for part in self.model.modules():
                if not isinstance(part, _BatchNorm):
                    part.training = False
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> EMATeacher:
        self._tensors = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tensors = None

    @torch.no_grad()
    def update(self, student: nn.Module) -> float:
        """Move towards the student.

        Buffers that are no batch-norm statistics are copied.

        Args:
            student (nn.Module): The segmentor of the same structure.

        Returns:
            float: The momentum used.
        """
        if self._tensors is None or not self._tensors.belong_to(student):
            self._tensors = _Tensors(self.model, student)
        step = self.steps.now()
        alpha = annealed_alpha(step, self.alpha)
        tensors = self._tensors
        ema_update(*tensors.parameters, alpha)
        if step == 0 or self.batch_norm == 'ema':
            ema_update(*tensors.statistics, alpha)
        ema_update(*tensors.others, 0)
        self.steps.tick()
        return alpha

    @torch.no_grad()
    def predict(self, view: View, seen: StudentOutput | None = None
                ) -> Tensor:
        """Class probabilities for a view.

        Args:
            view (View): Images ``(N, 3, H, W)``.
            seen (StudentOutput, optional): This teacher's pass over the
                view, if there was one: the backbone runs no second time.

        Returns:
            Tensor: float32, ``(N, C, H, W)``.
        """
        return class_probabilities(
            self.model, view.images, None if seen is None else seen.features)

    @torch.no_grad()
    def see(self, view: View, rng_keys: tuple[int | str, ...]
            ) -> StudentOutput:
        """A pass over a view: features, decoder features, embeddings.

        Batch-norm statistics of the projections alone are recorded.

        Args:
            view (View): Images ``(N, 3, H, W)``.
            rng_keys (tuple): Position of this pass.

        Returns:
            StudentOutput: Without gradients.
        """
        if self._adapter is None:
            self._adapter = StudentAdapter(self.model)
        return StudentOutput(self._adapter, view, rng_keys, update_norm=False,
                             recording=False)


class _Tensors:
    """Pairs of tensors of teacher and student, listed once.

    Args:
        teacher (nn.Module): The average.
        student (nn.Module): The model of the same structure.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self.first = next(student.parameters(), None)
        # By name: the student has parts that no teacher needs.
        theirs = dict(student.named_parameters())
        mine = dict(teacher.named_parameters())
        self.parameters = (list(mine.values()),
                           [theirs[name] for name in mine])
        self.statistics: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.others: tuple[list[Tensor], list[Tensor]] = ([], [])
        parts = dict(student.named_modules())
        for place, part in teacher.named_modules():
            own = parts[place]
            for name, buffer in part.named_buffers(recurse=False):
                averaged = (isinstance(part, _BatchNorm)
                            and buffer.is_floating_point())
                pair = self.statistics if averaged else self.others
                if isinstance(part, _BatchNorm) and not averaged:
                    continue  # the teacher counts its own batches
                pair[0].append(buffer)
                pair[1].append(getattr(own, name))

    def belong_to(self, student: nn.Module) -> bool:
        """Whether these are still the student's tensors."""
        return next(student.parameters(), None) is self.first


def _leave_out(model: nn.Module) -> None:
    """Take out what a teacher needs no copy of, such as banks."""
    for part in list(model.modules()):
        for name in getattr(part, 'ema_exclude', ()):
            setattr(part, name, nn.Identity())
