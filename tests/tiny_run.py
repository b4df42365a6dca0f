"""Whole runs of a tiny model on the embedded streets, in this process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from test_models_contrast_head import head_config

from datasets_common import streets
from helpers import dacs_parts, tiny_student

CROP = dict(type='RandomCrop', crop_size=(32, 32))
NUMBERS = itertools.count()


@contextmanager
def quick_runs():
    """Nobody waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda handle: None)
        yield


def model():
    """DACS with contrast against a bank, dropout, and a schedule."""
    student = tiny_student(num_classes=10, dropout=0.1)
    student['auxiliary_head'] = head_config(
        num_classes=10, bank=dict(
            type='PixelQueue', length=8, number=2), start=1, ramp=3)
    parts = dacs_parts()
    parts['pseudo_labels']['target']['threshold'] = 0.11
    parts['objectives']['contrast'] = dict(type='Contrast', head='aux')
    return dict(type='UDASegmentor', segmentor=student, **parts)


def config(work_dir, iterations=6, workers=0, interval=3, hooks=(),
           checkpoint=None, stop=None, val=False,
           train_dataloader_streams=None, **changes):
    """A complete config.

    Args:
        work_dir (Path): Where to.
        iterations (int): Of the whole run.
        workers (int): Of the loader.
        interval (int): Iterations between checkpoints.
        hooks (list): Besides the default ones.
        checkpoint (dict): Options of the checkpoint hook.
        stop (dict): Options of the stop hook.
        train_dataloader_streams (dict): Instead of the streets.
        val (bool): Whether to validate where checkpoints are saved.
        **changes: Other top-level keys.
    """
    number = next(NUMBERS)
    test = dict(
        batch_size=1, num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=streets('target', 2))
    validation = dict(
        val_cfg=dict(type='ValLoop'), val_dataloader=test,
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
    ) if val else {}
    return Config(dict(
        default_scope='mmseg',
        experiment_name=f'tiny{number}',
        work_dir=str(work_dir),
        model=model(),
        train_dataloader=dict(
            batch_size=2, num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type='PositionSampler'),
            dataset=dict(type='StreamDataset', streams=(
                train_dataloader_streams or dict(
                    source=dict(
                        dataset=streets('source', 7, CROP), cache=True),
                    target=dict(
                        labelled=False, cache=True,
                        dataset=streets('target', 5, CROP)))))),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations,
                       val_interval=interval if val else 10**6),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-3),
            constructor='UDAOptimWrapperConstructor',
            accumulative_counts=2),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0,
                 end=4),
            dict(type='PolyLR', power=0.9, by_epoch=False, begin=0,
                 end=10)],
        default_hooks=dict(
            # Logs not yet written are in a checkpoint as well.
            runtime_info=dict(type='DeferredRuntimeInfoHook'),
            logger=dict(type='LoggerHook', interval=3),
            checkpoint=dict(
                type='SafeCheckpointHook', by_epoch=False,
                interval=interval, **(checkpoint or {})),
            stop=dict(type='StopSignalHook', **(stop or {})),
            memory=dict(type='MemoryAdviceHook')),
        custom_hooks=[dict(type='PositionHook'), dict(type='NormSyncHook'),
                      *hooks],
        log_processor=dict(by_epoch=False, window_size=1),
        env_cfg=dict(mp_cfg=dict(mp_start_method='fork')),
        **{**validation, **changes}))


class Watch(Hook):
    """Keeps the losses; calls a function before or in an iteration."""

    def __init__(self, at=None, act=None):
        self.at, self.act = at, act
        self.losses = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            self.act(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        self.losses[runner.iter + 1] = {
            key: float(torch.as_tensor(value).detach())
            for key, value in outputs.items()}


def train(work_dir, at=None, act=None, resume=False, **options):
    """Train; the losses by iteration, and the runner.

    Args:
        work_dir (Path): Where to.
        at (int): The iteration before which to call ``act(runner)``.
        act (callable): See there.
        resume (bool): As ``--resume``.
        **options: See :func:`config`.
    """
    cfg = config(work_dir, **options)
    cfg.resume = resume
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    watch = Watch(at, act)
    runner.register_hook(watch)
    runner.train()
    return watch.losses, runner


def in_a_process(target, *arguments):
    """Call a function in a process of its own; its exit code.

    Forked, because importing everything again would take longest.
    """
    process = multiprocessing.get_context('fork').Process(
        target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def content(path):
    """A checkpoint as plain torch reads it."""
    return torch.load(Path(path), weights_only=True)


def same(one, two, where=''):
    """Two nested structures of tensors are equal, bit for bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f'{where}.{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f'{where}[{i}]')
    else:
        assert one == two, where
