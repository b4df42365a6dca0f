"""Checkpoints that survive what happens to a machine in a week."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from ...files import left_behind, written_whole
from ..checkpoint_content import make_plain, restore_histories
from ..checkpoint_files import POINTER, WHOLE_FILES, damage, to_try
from ..out_of_memory import is_out_of_memory

# What of the hook and of the message hub tells which checkpoints there are.
_OWN = ('last_ckpt', 'keep_ckpt_ids', 'best_ckpt_path', 'best_ckpt_path_dict')
_TOLD = ('last_ckpt', 'keep_ckpt_ids', 'best_')


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, for runs that are killed.

    - A checkpoint appears when it is complete and on the disk; so does
      ``last_checkpoint``. Those that are too old, and a best one that is best
      no more, are removed after that: there must be room for one more.
    - If it can't be written (disk full, quota, no memory to copy it), the
      ones before stay and training goes on with a warning. The checkpoint of
      the last iteration must be written, else the run fails.
    - It holds tensors and Python's own types: ``torch.load`` with
      ``weights_only=True`` reads it without this package.
    - ``--resume`` checks the latest checkpoint against its checksums. If it
      is damaged, a warning names it and the one before is used. A damaged
      file that is named (``load_from``) is an error, and so it is if none of
      several can be read.

    Only the local disk is covered; with other storage, and in mmengine's
    FlexibleRunner, files are written as mmengine does.

    Args:
        interval (int): Iterations (or epochs) between checkpoints; -1 is
            never.
        by_epoch (bool): Whether to count epochs.
        save_optimizer (bool): Without it no run can be resumed.
        save_param_scheduler (bool): The same.
        out_dir (str, optional): Where to; None is the work dir.
        max_keep_ckpts (int): How many are kept; -1 is all.
        save_last (bool): Save at the end, whatever the interval.
        save_best (str or list[str], optional): Metrics whose best checkpoint
            is kept.
        rule (str or list[str], optional): 'greater' or 'less', for these.
        greater_keys (list[str], optional): Metrics of the rule 'greater'.
        less_keys (list[str], optional): Metrics of the rule 'less'.
        file_client_args (dict, optional): mmengine's deprecated option.
        filename_tmpl (str, optional): None is ``iter_{}.pth``, or
            ``epoch_{}.pth``.
        backend_args (dict, optional): Of mmengine's storage backend.
        published_keys (str or list[str], optional): See mmengine.
        save_begin (int): No checkpoint before.
        on_error (str): 'warn' goes on when a checkpoint can't be written,
            'stop' ends the run.

    Raises:
        ValueError: If ``on_error`` is something else.
    """

    file_backend: Any
    backend_args: dict | None
    keep_ckpt_ids: deque

    def __init__(self,
                 interval: int = -1,
                 by_epoch: bool = True,
                 save_optimizer: bool = True,
                 save_param_scheduler: bool = True,
                 out_dir: str | Path | None = None,
                 max_keep_ckpts: int = -1,
                 save_last: bool = True,
                 save_best: str | list[str] | None = None,
                 rule: str | list[str] | None = None,
                 greater_keys: Sequence[str] | None = None,
                 less_keys: Sequence[str] | None = None,
                 file_client_args: dict | None = None,
                 filename_tmpl: str | None = None,
                 backend_args: dict | None = None,
                 published_keys: str | list[str] | None = None,
                 save_begin: int = 0,
                 on_error: str = 'warn') -> None:
        if on_error not in ('warn', 'stop'):
            raise ValueError('default_hooks.checkpoint.on_error must be '
                             f"'warn' or 'stop', got {on_error!r}.")
        super().__init__(
            interval=interval, by_epoch=by_epoch,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler, out_dir=out_dir,
            max_keep_ckpts=max_keep_ckpts, save_last=save_last,
            save_best=save_best, rule=rule, greater_keys=greater_keys,
            less_keys=less_keys, file_client_args=file_client_args,
            filename_tmpl=filename_tmpl, backend_args=backend_args,
            published_keys=published_keys, save_begin=save_begin)
        self.on_error = on_error

    # -- reading ----------------------------------------------------------
    def before_run(self, runner: Runner) -> None:
        """Choose what to resume from, and check it.

        Args:
            runner (Runner): The runner, before it loads or resumes.

        Raises:
            ValueError: If the named checkpoint is damaged, or none of those
                there are can be read.
        """
        if runner._has_loaded:
            return
        found: list[Any] = [None, [], None]
        if is_main_process():
            try:
                found[:2] = self._choose(runner)
            except ValueError as error:
                found[2] = str(error)
        # The others need not see the same disk, and must not disagree.
        broadcast_object_list(found)
        chosen, warnings, mistake = found
        if mistake:
            raise ValueError(mistake)
        for line in warnings:
            runner.logger.warning(line)
        if chosen:
            runner._load_from = chosen

    def _choose(self, runner: Runner) -> tuple[str | None, list[str]]:
        """What to resume from, if that is for us to say, and warnings."""
        named = runner._load_from
        if named is not None:
            wrong = damage(Path(named)) if Path(named).is_file() else None
            if wrong:
                raise ValueError(f'load_from: {named} {wrong}.')
            return None, []
        if not runner._resume or '://' in str(self.out_dir):
            return None, []
        skipped: list[str] = []
        work_dir = Path(runner.work_dir)
        folder = work_dir if self.out_dir is None else (
            Path(self.out_dir) / work_dir.name)
        for path in to_try(work_dir, folder, self.filename_tmpl):
            wrong = damage(path)
            if wrong is None:
                return str(path), [
                    f'--resume: {one}; skipped, {path.name} is used'
                    for one in skipped]
            skipped.append(f'{path} {wrong}')
        if skipped:
            raise ValueError(
                f'--resume: no checkpoint can be read ({"; ".join(skipped)})'
                '. To start again, delete them and '
                f'{work_dir / POINTER}.')
        return None, []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put together what :meth:`before_save_checkpoint` took apart.

        Args:
            runner (Runner): Not used.
            checkpoint (dict): Changed in place.
        """
        restore_histories(checkpoint)

    # -- writing ----------------------------------------------------------
    def before_train(self, runner: Runner) -> None:
        """Find the folder, and clear it of what killed runs left.

        Args:
            runner (Runner): The runner.
        """
        super().before_train(runner)
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if not self.by_epoch and self.interval > 0 and (
                self.interval % counts):
            runner.logger.warning(
                f'default_hooks.checkpoint.interval = {self.interval} is no '
                f'multiple of optim_wrapper.accumulative_counts = {counts}: '
                'the gradients accumulated at a checkpoint are not in it, so '
                'a resumed run differs a little.')
        if not self._is_local():
            return
        if self.backend_args is None:
            self.backend_args = dict(backend=WHOLE_FILES)
        if is_main_process():
            template = self.filename_tmpl.format('*')
            for path in (Path(self.out_dir) / template,
                         Path(self.out_dir) / f'best_*_{template}',
                         Path(runner.work_dir) / POINTER):
                for part in left_behind(path):
                    part.unlink(missing_ok=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict
                               ) -> None:
        """Keep tensors and Python's own types only.

        Args:
            runner (Runner): Not used.
            checkpoint (dict): Changed in place.
        """
        make_plain(checkpoint)

    def _save_checkpoint_with_step(self, runner: Runner, step: int,
                                   meta: dict) -> None:
        """Save, say so, and only then remove what is too old."""
        name = self.filename_tmpl.format(step)
        final = step >= (
            runner.max_epochs if self.by_epoch else runner.max_iters)
        outdated: list[str] = []
        with self._or_as_before(runner, name, final):
            outdated = self._counted(runner, step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            runner.save_checkpoint(
                self.out_dir, name, self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta, by_epoch=self.by_epoch,
                backend_args=self.backend_args)
            if is_main_process():
                pointer = Path(runner.work_dir) / POINTER
                with written_whole(pointer, durable=True) as file:
                    file.write(str(self.last_ckpt).encode())
            self._remove(runner, outdated)

    def _counted(self, runner: Runner, step: int) -> list[str]:
        """Count a checkpoint in; the paths of those that are now too old."""
        if self.max_keep_ckpts <= 0:
            return []
        steps = [one for one in self.keep_ckpt_ids if one != step] + [step]
        self.keep_ckpt_ids = deque(
            steps[-self.max_keep_ckpts:], self.max_keep_ckpts)
        runner.message_hub.update_info(
            'keep_ckpt_ids', list(self.keep_ckpt_ids))
        return [
            self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(one))
            for one in steps[:-self.max_keep_ckpts]]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As mmengine, which removes the old one first: do that after."""
        backend, later = self.file_backend, _RemovesLater()
        with self._or_as_before(runner, 'the best checkpoint'):
            self.file_backend = later if self._is_local() else backend
            try:
                super()._save_best_checkpoint(runner, metrics)
            finally:
                self.file_backend = backend
            best = [getattr(self, 'best_ckpt_path', None),
                    *getattr(self, 'best_ckpt_path_dict', {}).values()]
            self._remove(runner, [
                path for path in later.paths if path not in best])

    def _remove(self, runner: Runner, paths: Sequence[str]) -> None:
        if not is_main_process():
            return
        for path in paths:
            try:
                if self.file_backend.isdir(path):  # DeepSpeed's
                    self.file_backend.rmtree(path)
                elif self.file_backend.exists(path):
                    self.file_backend.remove(path)
            except OSError as error:
                runner.logger.warning(f'{path} cannot be removed ({error})')

    def _is_local(self) -> bool:
        return (self.file_client_args is None
                and isinstance(self.file_backend, LocalBackend))

    @contextmanager
    def _or_as_before(self, runner: Runner, name: str, final: bool = False
                      ) -> Iterator[None]:
        """If it can't be written, forget that it was tried."""
        own = {key: copy.copy(getattr(self, key))
               for key in _OWN if hasattr(self, key)}
        hub = runner.message_hub
        told = {key: value for key, value in hub.runtime_info.items()
                if key.startswith(_TOLD)}
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, OSError) and (
                    not is_out_of_memory(error)):
                raise
            for key, value in own.items():
                setattr(self, key, value)
            for key in [one for one in hub.runtime_info
                        if one.startswith(_TOLD)]:
                hub.pop_info(key)
            hub.update_info_dict(told)
            message = (f'{name} cannot be written to {self.out_dir} '
                       f'({type(error).__name__}: {error}); the checkpoints '
                       'before it are kept')
            if final or self.on_error == 'stop':
                raise CheckpointError(f'{message}.') from error
            runner.logger.error(f'{message}, and training goes on.')


class CheckpointError(OSError):
    """A checkpoint that had to be written could not be."""


class _RemovesLater(LocalBackend):
    """Keeps the paths that it is told to remove."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self.paths.append(str(filepath))

    def rmtree(self, dir_path: str | Path) -> None:
        self.paths.append(str(dir_path))
