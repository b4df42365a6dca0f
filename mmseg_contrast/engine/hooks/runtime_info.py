"""What mmengine logs, without waiting for the device in each iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.hooks import LoggerHook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.utils import apply_to
from mmseg.registry import HOOKS
from torch import Tensor

#: Scalars of one iteration: its number, their names, their values.
Row = tuple[int, tuple[str, ...], Tensor]


def extend_history(hub: MessageHub, key: str,
                   values: Sequence[int | float]) -> None:
    """Append values to a log, as ``update_scalar`` does one by one.

    Args:
        hub (MessageHub): Where it is kept.
        key (str): Name of the log, such as ``'train/loss'``.
        values (Sequence): In the order of the iterations.
    """
    if key not in hub.log_scalars:
        hub.update_scalar(key, values[0])
        values = values[1:]
    # At once: each append copies the whole history.
    buffer = hub.log_scalars[key]
    numbers, counts = buffer.data
    most = buffer.max_length
    hub.log_scalars[key] = HistoryBuffer(
        np.append(numbers, values)[-most:],
        np.append(counts, np.ones(len(values), dtype=int))[-most:], most)


class DeferredScalars:
    """Scalars that stay on the device until somebody reads them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    @torch.no_grad()
    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Keep copies of some scalars, one kernel for all of a kind.

        Args:
            scalars (Mapping): Tensors of one entry, by name.
        """
        kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for key, value in scalars.items():
            # By type: a common one would round some of them.
            kinds.setdefault((value.device, value.dtype), {})[key] = (
                value.detach().reshape(()))
        for kind, found in kinds.items():
            self._rows.setdefault(kind, []).append((
                self._number, tuple(found), torch.stack([*found.values()])))
        self._number += 1

    def take(self) -> dict[str, list[int | float]]:
        """All that is kept, in the order in which it came; then nothing is.

        The host waits once for each device and type, usually once.

        Returns:
            dict: Values by name.
        """
        rows, self._rows = self._rows, {}
        found: dict[str, list[tuple[int, int | float]]] = {}
        for some in rows.values():
            values = iter(torch.cat([row[2] for row in some]).tolist())
            for number, names, _ in some:
                for name in names:
                    found.setdefault(name, []).append((number, next(values)))
        return {name: [value for _, value in sorted(
            pairs, key=lambda pair: pair[0])] for name, pairs in found.items()}


class _DeferredClip:
    """A clipping function whose norm nobody waits for.

    Args:
        clip (Callable): As torch's ``clip_grad_norm_``.
        keep (Callable): What gets the norm.
    """

    def __init__(self, clip: Callable[..., Tensor | None],
                 keep: Callable[[Tensor], None]) -> None:
        self.clip = clip
        self.keep = keep

    def __call__(self, parameters: list[Tensor], **options: Any) -> None:
        """Clip, and give the wrapper no norm that it would wait for."""
        norm = self.clip(parameters, **options)
        if norm is not None:
            self.keep(norm)


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """``RuntimeInfoHook`` that moves scalars to the host when they are read.

    mmengine's calls ``item()`` on each loss of each iteration, and the
    optimizer wrapper on each norm of clipped gradients: the host waits for
    the device every time. Here scalars stay on the device, one small tensor
    for an iteration, and are copied at once in the iterations in which a
    ``LoggerHook`` writes, before a checkpoint, and after training. The
    values, their means and what checkpoints hold are the same. A hook of
    yours that reads ``train/...`` of the message hub in other iterations
    finds the latest copied values; give it an ``interval``.

    It takes the place of mmengine's:
    ``default_hooks = dict(runtime_info=dict(type='DeferredRuntimeInfoHook'))``

    Args:
        interval (int, optional): Copy also every so many iterations. None:
            only when it is logged.

    Raises:
        ValueError: If the interval is below 1.
    """

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None and interval < 1:
            raise ValueError(
                'DeferredRuntimeInfoHook.interval in '
                f'default_hooks.runtime_info must be >= 1, got {interval}.')
        self.interval = interval
        self._scalars = DeferredScalars()

    def before_train(self, runner: Runner) -> None:
        """See mmengine's; defer the norms of clipped gradients as well.

        Args:
            runner (Runner): The runner.
        """
        super().before_train(runner)
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        for one in wrapper.values() if several else [wrapper]:
            self._defer_clipping(one)

    def _defer_clipping(self, wrapper: OptimWrapper) -> None:
        if not wrapper.clip_grad_kwargs:
            return
        clip = wrapper.clip_func
        if isinstance(clip, _DeferredClip):  # the second training of a run
            clip = clip.clip
        key = f'train/{wrapper.grad_name}'
        wrapper.clip_func = _DeferredClip(
            clip, lambda norm: self._scalars.add({key: norm}))

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Keep the scalars; copy them if they are about to be read.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the iteration in the loop.
            data_batch (Any, optional): Not used.
            outputs (dict, optional): What ``train_step`` returned.
        """
        scalars = {}
        for key, value in (outputs or {}).items():
            if isinstance(value, Tensor) and value.numel() == 1:
                scalars[f'train/{key}'] = value
            else:
                runner.message_hub.update_scalar(f'train/{key}', value)
        self._scalars.add(scalars)
        if self._is_read(runner, batch_idx):
            self.flush(runner)

    def _is_read(self, runner: Runner, batch_idx: int) -> bool:
        """Whether a logger writes after this iteration."""
        intervals = [hook.interval for hook in runner.hooks
                     if isinstance(hook, LoggerHook)]
        if self.interval is not None:
            intervals.append(self.interval)
        return any(self.every_n_inner_iters(batch_idx, interval)
                   for interval in intervals) or self.end_of_epoch(
                       runner.train_dataloader, batch_idx)

    def flush(self, runner: Runner) -> None:
        """Move what is kept into the message hub.

        Args:
            runner (Runner): The runner.
        """
        for key, values in self._scalars.take().items():
            extend_history(runner.message_hub, key, values)

    def before_save_checkpoint(self, runner: Runner,
                               checkpoint: dict) -> None:
        """Put the latest scalars into the checkpoint.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What will be saved.
        """
        if self._scalars:
            self.flush(runner)
            checkpoint['message_hub'] = apply_to(
                runner.message_hub.state_dict(),
                lambda one: isinstance(one, Tensor), lambda one: one.cpu())

    def after_train(self, runner: Runner) -> None:
        """Copy the rest.

        Args:
            runner (Runner): The runner.
        """
        self.flush(runner)
        super().after_train(runner)
