"""Equal batch-norm statistics on all ranks."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import nn


@torch.no_grad()
def average_norm_statistics(model: nn.Module) -> None:
    """Replace running means and variances by their mean over all ranks.

    Parameters are equal on all ranks, running statistics are not (but for
    SyncBN): each rank saw its own images, and only rank 0's are saved.

    Args:
        model (nn.Module): Student and teachers; all ranks call this.
    """
    buffers = [
        buffer for part in model.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        and part.track_running_stats
        for buffer in (part.running_mean, part.running_var)
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    all_reduce(flat, 'mean')
    pieces = flat.split([buffer.numel() for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        buffer.copy_(piece.view_as(buffer))


def checkpoint_follows(runner: Runner) -> bool:
    """Whether this iteration ends with a checkpoint, or the training does.

    Args:
        runner (Runner): The runner, in ``after_train_iter``.
    """
    number = runner.iter + 1
    return number == runner.max_iters or any(
        isinstance(hook, CheckpointHook) and not hook.by_epoch
        and hook.interval > 0 and number % hook.interval == 0
        for hook in runner.hooks)


@HOOKS.register_module()
class NormSyncHook(Hook):
    """Averages batch-norm statistics over ranks where they are used.

    That is before validation, before a checkpoint is saved, and after
    training. One rank alone: does nothing.
    """

    # Before the checkpoint hook (VERY_LOW) saves.
    priority = 'LOW'

    def average(self, runner: Runner) -> None:
        """Average now; all ranks call this.

        Args:
            runner (Runner): The runner.
        """
        if get_world_size() == 1:
            return
        model = runner.model
        average_norm_statistics(
            model.module if is_model_wrapper(model) else model)

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Before the checkpoint hook's turn, if it is going to save."""
        if checkpoint_follows(runner):
            self.average(runner)

    def before_val(self, runner: Runner) -> None:
        """Before validation."""
        self.average(runner)
