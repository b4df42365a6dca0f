"""A checkpoint before the scheduler's patience ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from ..loader import stop_workers
from .norm_sync import NormSyncHook


@HOOKS.register_module()
class StopSignalHook(Hook):
    """Saves a checkpoint and exits when the job is told to end.

    A scheduler that needs the machine, or whose time limit is near, sends
    SIGTERM and a while later SIGKILL. At the end of the iteration (of the
    one that updates the weights, where gradients are accumulated), also in
    validation, a checkpoint is saved and the process exits with 128 plus the
    number of the signal: 143 for SIGTERM. That is neither 0 (the training is
    not complete) nor 1 (nothing is wrong), so a job script can tell:

    .. code:: bash

        srun python tools/train.py config.py --launcher slurm --resume
        [ $? -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"

    Further signals while it saves change nothing. Several ranks ask each
    other every ``interval`` iterations whether one of them was signalled,
    and then all stop after the same iteration.

    In an epoch-based run nothing is saved, because mmengine can't resume
    within an epoch.

    Args:
        signals (Sequence[str]): Names of signals, such as 'SIGUSR1'.
        interval (int): Iterations between questions, if there are several
            ranks. Each waits for the GPU.

    Raises:
        ValueError: If a signal is unknown or can't be handled, or the
            interval not positive.
    """

    # After the checkpoint hook, which may be about to save anyway.
    priority = 'LOWEST'

    def __init__(self, signals: Sequence[str] = ('SIGTERM',),
                 interval: int = 10) -> None:
        signals = [signals] if isinstance(signals, str) else list(signals)
        for name in signals:
            if not name.startswith('SIG') or name in (
                    'SIGKILL', 'SIGSTOP') or not hasattr(signal, name):
                raise ValueError('StopSignalHook.signals: no process can '
                                 f'handle a signal named {name!r}.')
        if interval < 1:
            raise ValueError('StopSignalHook.interval must be >= 1, got '
                             f'{interval}.')
        self.signals = [signal.Signals[name] for name in signals]
        self.interval = interval
        self._received, self._process = 0, 0
        self._loop: CodeType | None = None
        self._before: dict[signal.Signals, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Listen to the signals.

        Args:
            runner (Runner): The runner.
        """
        self._received, self._process = 0, os.getpid()
        self._loop = getattr(type(runner.train_loop).run, '__code__', None)
        # Python allows it in no other thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._receive)
                            for one in self.signals}

    def after_train(self, runner: Runner) -> None:
        """Leave the signals to who had them before.

        Args:
            runner (Runner): Not used.
        """
        for one, handler in self._before.items():
            signal.signal(one, handler or signal.SIG_DFL)
        self._before = {}

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Stop here, if told to."""
        number = self._received
        if get_world_size() > 1:
            if (batch_idx + 1) % self.interval:
                return
            told = torch.tensor(number)
            all_reduce(told, 'max')
            number = int(told)
        if number and _gradients_used(runner, runner.iter + 1):
            self._stop(runner, number, runner.iter + 1)

    def after_val_iter(self,
                       runner: Runner,
                       batch_idx: int,
                       data_batch: dict | None = None,
                       outputs: Sequence | None = None) -> None:
        """Stop here, if told to while training is validated.

        Several ranks may have different numbers of batches here, so they
        can't ask each other: the first saves, and all stop after the next
        iteration in which they do.
        """
        if not self._before or not self._received or (
                not _gradients_used(runner, runner.iter)):
            return
        if get_world_size() == 1:
            self._stop(runner, self._received, runner.iter)
        self._save(runner, runner.iter)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process and self._trains(frame):
            self._received = number
            return
        # A training that failed, or a process forked by one, has nothing to
        # save: no hook says so.
        for one, handler in self._before.items():
            signal.signal(one, handler or signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _trains(self, frame: FrameType | None) -> bool:
        """Whether the loop that began still runs."""
        while frame is not None:
            if frame.f_code is self._loop:
                return True
            frame = frame.f_back
        return False

    def _stop(self, runner: Runner, number: int, step: int) -> None:
        name = signal.Signals(number).name
        runner.logger.warning(f'{name}: stopped after iteration {step}.')
        for hook in runner.hooks:
            if isinstance(hook, NormSyncHook):
                hook.average(runner)
        saved = self._save(runner, step)
        # The first to exit may take the others with it.
        barrier()
        runner.logger.warning(
            f'{name}: {saved}; exit code {128 + number}.')
        runner.visualizer.close()
        loop = runner.train_loop
        stop_workers(loop.dataloader,
                     getattr(loop, 'dataloader_iterator', None))
        self.after_train(runner)
        raise SystemExit(128 + number)

    def _save(self, runner: Runner, step: int) -> str:
        """Save unless that was done just now; what there is, in words."""
        hook = next((one for one in runner.hooks
                     if isinstance(one, CheckpointHook)), None)
        if hook is None:
            return 'nothing is saved, since there is no CheckpointHook'
        if hook.by_epoch:
            return f'the last checkpoint is {hook.last_ckpt}'
        name = hook.filename_tmpl.format(step)
        if hook.last_ckpt is None or Path(hook.last_ckpt).name != name:
            hook._save_checkpoint_with_step(
                runner, step, meta=dict(epoch=runner.epoch, iter=step))
        return f'--resume goes on from {hook.last_ckpt}'


def _gradients_used(runner: Runner, step: int) -> bool:
    """Whether no accumulated gradients would be lost after this step."""
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return step % counts == 0 or step == runner.max_iters
