"""Keeps what is not finite out of weights, and says where it came from."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor, nn

from ...contrast import Bank
from ..finite import (
    IMAGES,
    LOSS,
    NonFiniteError,
    Place,
    Trace,
    broken_gradients,
    broken_weights,
    first_cause,
    gradients_flag,
    not_finite,
    views_of,
)
from ..looking import unwrapped
from ..safe_step import HOST, LATE, SCALER, SafeStep, way_of
from ..saved_batch import broken_images, image_paths, save_batch, unlabelled
from .norm_sync import checkpoint_follows


@dataclass
class _Record:
    """What one iteration left behind, on its way to the host.

    Args:
        iteration (int): Iterations before it.
        places (list[Place]): What the first numbers are of.
        numbers (Tensor): Those of the trace, then three flags of all ranks:
            losses or images of this iteration, gradients, the update.
        stepped (bool): Whether it ended with an update.
        batch (Mapping): As the loader gave it.
        arrived (torch.cuda.Event, optional): When they are on the host.
    """

    iteration: int
    places: list[Place]
    numbers: Tensor
    stepped: bool
    batch: Mapping[str, Any]
    arrived: torch.cuda.Event | None = None


@HOOKS.register_module()
class NaNGuardHook(Hook):
    """Stops, or goes on without the step, where a loss is not finite.

    A NaN reaches all weights in one step, the EMA teacher with the next one,
    and every checkpoint after that. This hook looks at the losses of each
    iteration, at the images of all views and, before the step, at the
    gradients; all ranks decide alike. It names the first loss, its views and
    what was not finite before it, and saves the batch.

    On a GPU nothing waits for the device: flags arrive on the host while the
    next iteration runs. Until then fused optimizers and gradient scalers
    leave the step out on the device, so the weights are not touched. Other
    optimizers on a GPU take it: with 'stop' the run ends one iteration later
    without having saved anything, with 'skip' each step waits for its flag.
    Before a checkpoint and before validation all flags are waited for.

    With 'skip', statistics of batch norms, and other buffers that a pass
    writes, are put back. Banks, prototypes and histograms take in nothing
    that is not finite by themselves. With gradient accumulation the whole
    update is left out.

    With a gradient scaler (AmpOptimWrapper) infinite gradients are normal,
    and the scaler's matter.

    Args:
        action (str): 'stop' or 'skip'.
        max_skips (int): So many updates in a row are left out, >= 1; one more
            stops the run.
        check_gradients (bool): Whether gradients are looked at.
        locate (bool): Whether views, teachers and the student's passes are;
            only a UDASegmentor has them.
        max_files (int): Batches saved at most, >= 0.
        out_dir (str): Folder for them below the work dir.

    Raises:
        ValueError: If an argument is out of range.
    """

    # After hooks that ask for steps (up to BELOW_NORMAL, 60), before those
    # that average norms or save (LOW, 70).
    priority = 65

    def __init__(self,
                 action: str = 'stop',
                 max_skips: int = 10,
                 check_gradients: bool = True,
                 locate: bool = True,
                 max_files: int = 5,
                 out_dir: str = 'nan_guard') -> None:
        if action not in ('stop', 'skip'):
            raise ValueError("NaNGuardHook.action in custom_hooks must be "
                             f"'stop' or 'skip', got {action!r}.")
        for name, value, least in (('max_skips', max_skips, 1),
                                   ('max_files', max_files, 0)):
            if value < least:
                raise ValueError(f'NaNGuardHook.{name} in custom_hooks must '
                                 f'be at least {least}, got {value}.')
        self.action = action
        self.max_skips = max_skips
        self.check_gradients = check_gradients
        self.locate = locate
        self.max_files = max_files
        self.out_dir = out_dir
        self.skipped = 0  # updates left out so far
        self._safe: SafeStep | None = None

    # -- beginning and end -------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Stand before the optimizer's step.

        Raises:
            ValueError: If there are several optimizers, or if weights are
                not finite before training.
        """
        self._model = model = unwrapped(runner.model)
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise ValueError('NaNGuardHook in custom_hooks knows one '
                             'optimizer; remove the hook.')
        broken = broken_weights(model)
        if broken:
            raise ValueError(
                f'{len(broken)} weights are not finite before training, the '
                f'first is {broken[0]!r}: load_from or resume name a spoilt '
                'checkpoint, take an earlier one.')
        self._device = next(model.parameters()).device
        way = way_of(runner.optim_wrapper, self._device,
                     self.action == 'skip')
        if way == HOST and self._device.type != 'cpu':
            print_log('NaNGuardHook: this optimizer is not fused, so with '
                      "action='skip' each step waits for the device; "
                      'optim_wrapper.optimizer.fused=True avoids it.',
                      logger='current')
        self._records: deque[_Record] = deque()
        self._in_a_row = self._files = 0
        self._zero = torch.zeros(1, device=self._device)
        self._update: Tensor | None = None  # its flag so far
        self._told = False  # of this update
        self._trace: Trace | None = None
        self._buffers = _written_buffers(model) if (
            self.action == 'skip') else []
        self._safe = SafeStep(
            runner.optim_wrapper, way, self._ask, self._note_gradients)
        stock = model.parse_losses

        # A function: a copy of the model must not copy this hook.
        def parse_losses(losses: dict[str, Any]
                         ) -> tuple[Tensor, dict[str, Tensor]]:
            total, log_vars = stock(losses)
            self._watch(log_vars)
            return total, log_vars

        model.parse_losses = parse_losses

    def after_train(self, runner: Runner) -> None:
        """Wait for the last flags and stand aside."""
        self._judge_all(runner)
        if self._safe is not None:
            self._safe.release()
            del self._model.parse_losses
            self._safe = None

    def before_val(self, runner: Runner) -> None:
        """No validation of spoilt weights."""
        self._judge_all(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict
                               ) -> None:
        """No spoilt weights in a file, whoever saves."""
        self._judge_all(runner)

    # -- one iteration -----------------------------------------------------

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Watch from here."""
        self._trace = Trace()
        self._shared: Tensor | None = None
        self._stepped = self._looked = self._keeps_step = False
        self._gradients: list[str] = []
        if self.locate and hasattr(self._model, 'keep_step'):
            # Others read the step after the iteration; if none does, it is
            # let go of before the backward.
            self._keeps_step = not self._model.keep_step
            self._model.keep_step, self._model.last_step = True, None
        self._before = _flat(self._buffers) if self._buffers else None

    def _watch(self, log_vars: Mapping[str, Tensor]) -> None:
        """All ways to train pass here, some with parts of the losses."""
        if self._trace is not None and self._shared is None:
            self._trace.add_losses(log_vars)
            self._look_at_step(self._trace)

    def _look_at_step(self, trace: Trace) -> None:
        step = getattr(self._model, 'last_step', None)
        if not self.locate or self._looked or step is None:
            return
        self._looked = True
        trace.add_step(step)
        if self._keeps_step:
            self._model.last_step = None
            self._model.keep_step = False

    def _ask(self) -> Tensor:
        """Whether this step must be left out, on all ranks alike."""
        if self._trace is None:  # not in a train loop
            return self._zero
        assert self._safe is not None
        gradients = self._zero
        if self.check_gradients and self._safe.way != SCALER:
            gradients = gradients_flag(self._safe.optimizer, self._device)
        self._stepped = True
        return self._settle(self._trace, gradients)

    def _settle(self, trace: Trace, gradients: Tensor) -> Tensor:
        """One collective: what is bad here is bad on all ranks."""
        self._look_at_step(trace)
        self._numbers, bad = trace.numbers(self._device)
        self._shared = torch.cat([bad, gradients])
        if get_world_size() > 1:
            all_reduce(self._shared, 'max')
        worst = self._shared.amax(0, keepdim=True)
        self._update = worst if self._update is None else torch.maximum(
            worst, self._update)
        return self._update

    def _note_gradients(self) -> None:
        """While they are there."""
        self._gradients = broken_gradients(self._model)

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Put buffers back, send the flags, look at those that arrived.

        Raises:
            NonFiniteError: If something was not finite, with 'stop', or too
                often in a row, with 'skip'.
        """
        if self._trace is None or self._safe is None:
            return
        if self._shared is None:  # no update yet, gradients add up
            self._settle(self._trace, self._zero)
        assert self._shared is not None and self._update is not None
        if self._before is not None:
            _put_back(self._buffers, self._before, self._shared[:1] > 0)
        self._records.append(self._sent(_Record(
            runner.iter, self._trace.places,
            torch.cat([self._numbers, self._shared, self._update]),
            self._stepped,
            data_batch if isinstance(data_batch, Mapping) else {})))
        self._trace = None
        if self._stepped:
            self._update = None
        if self._safe.way == HOST or checkpoint_follows(runner):
            self._judge_all(runner)
        while len(self._records) > 1:
            self._judge(runner, self._records.popleft())

    def _sent(self, record: _Record) -> _Record:
        """On its way to the host, without waiting."""
        numbers = record.numbers
        if numbers.device.type != 'cuda':
            return record
        # torch keeps pinned memory for the next time, once it has arrived.
        record.numbers = torch.empty(len(numbers), pin_memory=True)
        record.numbers.copy_(numbers, non_blocking=True)
        record.arrived = torch.cuda.Event()
        record.arrived.record()
        return record

    # -- judgement ---------------------------------------------------------

    def _judge_all(self, runner: Runner) -> None:
        while self._records:
            self._judge(runner, self._records.popleft())

    def _judge(self, runner: Runner, record: _Record) -> None:
        """Look at an iteration whose numbers have arrived."""
        if record.arrived is not None:
            record.arrived.synchronize()
        *numbers, losses, gradients, update = record.numbers.tolist()
        text = ''
        if losses or gradients and not self._told:
            text = self._describe(runner, record, numbers, bool(losses))
            self._told = True
            self._stop_or_warn(text)
        if not record.stepped:
            return
        self._told = False
        self._in_a_row = self._in_a_row + 1 if update else 0
        self.skipped += bool(update)
        if self._in_a_row > self.max_skips:
            raise NonFiniteError(
                f'{text} {self._in_a_row} updates in a row were left out, '
                f'more than NaNGuardHook.max_skips = {self.max_skips}.')

    def _stop_or_warn(self, text: str) -> None:
        assert self._safe is not None
        if self.action == 'skip':
            # Other ranks than the first show errors alone.
            print_log(f'{text} This update is left out.', logger='current',
                      level=logging.WARNING if is_main_process() else (
                          logging.ERROR))
            return
        if self._safe.way == LATE:
            text += (' The optimizer is not fused, so its step was taken: '
                     'the weights in memory are spoilt, no checkpoint is.')
        raise NonFiniteError(text)

    def _describe(self, runner: Runner, record: _Record,
                  numbers: list[float], losses: bool) -> str:
        """What, where, since where, and the file."""
        found = not_finite(record.places, numbers)
        mine = [name for kind, name in found if kind == LOSS]
        bad = bool(mine) or any(kind == IMAGES for kind, _ in found)
        text = f'Iteration {record.iteration + 1}: '
        if mine:
            text += f'{mine[0]} is {found[LOSS, mine[0]]}'
            views = views_of(self._model, mine[0])
            text += f', on {" and ".join(map(repr, views))}.' if (
                views) else '.'
        elif bad:
            text += 'all losses are finite, but images are not.'
        elif losses:
            return (text + 'a loss or an image is not finite on another '
                    'rank, which names it.')
        else:
            text += 'all losses are finite, but gradients are not'
            text += f' (the first of {self._gradients[0]}).' if (
                self._gradients) else '.'
        weights = [] if self._safe is None or self._safe.way == LATE else (
            broken_weights(self._model, buffers=False))
        text += ' ' + first_cause(
            found, weights, broken_images(record.batch),
            any(kind == IMAGES for kind, _ in record.places))
        for stream in unlabelled(record.batch):
            text += f' No pixel{f" of {stream!r}" if stream else ""} has a ' \
                'label.'
        return text + self._save(runner, record, found, text)

    def _save(self, runner: Runner, record: _Record,
              found: dict[Place, float], text: str) -> str:
        if self._files >= self.max_files or not record.batch:
            return ''
        self._files += 1
        path = Path(runner.work_dir, self.out_dir, (
            f'iter_{record.iteration + 1:06d}_rank{get_rank()}.pt'))
        save_batch(path, record.batch, dict(
            message=text, iteration=record.iteration, seed=runner.seed,
            rank=get_rank(), world_size=get_world_size(),
            not_finite={f'{kind} {name}': value
                        for (kind, name), value in found.items()},
            paths=image_paths(record.batch)))
        return f' The batch is in {path}.'


def _written_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Floating buffers that a pass may write, such as norms' statistics.

    Banks are left out: they are large, and take in no NaN.
    """
    return [(part, name) for part in model.modules()
            if not isinstance(part, Bank)
            for name, one in part.named_buffers(recurse=False)
            if one.is_floating_point()
            and name not in part._non_persistent_buffers_set]


def _flat(buffers: list[tuple[nn.Module, str]]) -> Tensor:
    # By name: some heads put another tensor in its place.
    return torch.cat([getattr(part, name).flatten()
                      for part, name in buffers])


def _put_back(buffers: list[tuple[nn.Module, str]], before: Tensor,
              flag: Tensor) -> None:
    """Buffers as they were, where the flag says so; no host sync."""
    kept = before.where(flag, _flat(buffers))
    tensors = [getattr(part, name) for part, name in buffers]
    pieces = kept.split([one.numel() for one in tensors])
    torch._foreach_copy_(tensors, [
        piece.view_as(one) for piece, one in zip(
            pieces, tensors, strict=True)])
