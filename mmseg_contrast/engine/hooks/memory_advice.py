"""Says what to reduce when the memory does not suffice."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from ..out_of_memory import advice, is_out_of_memory


@HOOKS.register_module()
class MemoryAdviceHook(Hook):
    """Logs which settings to reduce, when an iteration runs out of memory.

    The error is raised again as it was. The iteration is lost; the
    checkpoints are those of before, and a resumed run may have other values
    of all settings that are named but the batch size, which moves the
    position in the data.
    """

    def before_train(self, runner: Runner) -> None:
        """Look after each iteration of the loop.

        Args:
            runner (Runner): The runner, its loop built.
        """
        loop = runner.train_loop
        run = loop.run_iter

        # No hook is called when an iteration fails.
        @wraps(run)
        def watched(*batch: Any) -> None:
            try:
                run(*batch)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    runner.logger.error(_message(runner, error))
                raise

        loop.run_iter = watched


def _message(runner: Runner, error: BaseException) -> str:
    said = str(error)
    on_gpu = torch.cuda.is_initialized() and not isinstance(
        error, MemoryError) and "can't allocate memory" not in said
    used = ''
    if on_gpu:
        most = torch.cuda.max_memory_allocated() / 2**30
        used = f', at most {most:.1f} GiB were in use'
    return (f'Out of memory on the {"GPU" if on_gpu else "CPU"} in iteration '
            f'{runner.iter + 1}{used}. What to change, the mildest first: '
            f'{advice(runner.cfg, on_gpu)}.')
