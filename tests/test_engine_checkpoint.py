"""Checkpoints: written whole, plain in content, checked before use."""

from __future__ import annotations

import os
import resource
import signal
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.runner import save_checkpoint
from tiny_run import in_a_process

from mmseg_contrast.engine import mistakes
from mmseg_contrast.engine.checkpoint_content import (
    make_plain,
    restore_histories,
)
from mmseg_contrast.engine.checkpoint_files import damage, to_try
from mmseg_contrast.engine.hooks import SafeCheckpointHook, norm_sync
from mmseg_contrast.engine.hooks.safe_checkpoint import CheckpointError
from mmseg_contrast.files import written_whole


class Runner:
    """As much of a runner as the hook needs; a checkpoint is 80 kB."""

    numbers = iter(range(10**6))
    epoch, max_iters, max_epochs = 0, 100, 1

    def __init__(self, work_dir, load_from=None, resume=False):
        name = f'checkpoint{next(self.numbers)}'
        self.work_dir = str(work_dir)
        self.message_hub = MessageHub.get_instance(name)
        self.logger = MMLogger.get_instance(name)
        self.said = []
        self.logger.warning = self.logger.error = self.said.append
        self.optim_wrapper = SimpleNamespace()
        self._load_from, self._resume = load_from, resume
        self._has_loaded = False
        self.iter = 0
        self.saves = []

    def save_checkpoint(self, out_dir, filename, file_client_args=None,
                        backend_args=None, **options):
        folder = Path(out_dir)
        self.saves.append((filename, sorted(
            path.name for path in folder.glob('*.pth'))))
        save_checkpoint(
            dict(weight=torch.randn(20000), name=filename,
                 hub=dict(self.message_hub.runtime_info)),
            str(folder / filename), backend_args=backend_args)


def start(work_dir, **options):
    runner = Runner(work_dir)
    hook = SafeCheckpointHook(by_epoch=False, interval=1, **options)
    hook.before_train(runner)
    return hook, runner


def save(hook, runner, step):
    runner.iter = step - 1
    hook.after_train_iter(runner, step - 1)


def names(folder):
    """All files, those of killed writers too."""
    return sorted(path.name for path in Path(folder).iterdir())


@contextmanager
def full_disk():
    """The kernel refuses to write files of more than 10 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- writing ---------------------------------------------------------------
def test_checkpoint_is_removed_only_when_the_next_is_complete(tmp_path):
    hook, runner = start(tmp_path, max_keep_ckpts=1)
    for step in (1, 2, 3):
        save(hook, runner, step)
    # While a checkpoint is written, the one before is there.
    assert runner.saves == [
        ('iter_1.pth', []), ('iter_2.pth', ['iter_1.pth']),
        ('iter_3.pth', ['iter_2.pth'])]
    assert names(tmp_path) == ['iter_3.pth', 'last_checkpoint']
    last = (tmp_path / 'last_checkpoint').read_text()
    assert last == str(tmp_path / 'iter_3.pth')
    saved = torch.load(last, weights_only=True)
    assert saved['hub'] == dict(keep_ckpt_ids=[3], last_ckpt=last)


def test_checkpoint_on_a_full_disk(tmp_path):
    hook, runner = start(tmp_path, max_keep_ckpts=1)
    save(hook, runner, 1)
    with full_disk():
        save(hook, runner, 2)
    # Nothing is half there, nothing is forgotten.
    assert names(tmp_path) == ['iter_1.pth', 'last_checkpoint']
    assert damage(tmp_path / 'iter_1.pth') is None
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_1.pth')
    assert list(hook.keep_ckpt_ids) == [1]
    assert hook.last_ckpt == str(tmp_path / 'iter_1.pth')
    assert runner.message_hub.get_info('last_ckpt') == hook.last_ckpt
    assert len(runner.said) == 1
    for words in ('iter_2.pth cannot be written', str(tmp_path),
                  'File too large', 'training goes on'):
        assert words in runner.said[0]
    save(hook, runner, 3)
    assert names(tmp_path) == ['iter_3.pth', 'last_checkpoint']


@pytest.mark.parametrize('step, options', [
    (100, {}), (2, dict(on_error='stop'))], ids=['last', 'stop'])
def test_checkpoint_that_must_be_written(tmp_path, capsys, step, options):
    hook, runner = start(tmp_path, **options)
    save(hook, runner, 1)
    with full_disk(), pytest.raises(CheckpointError,
                                    match=f'iter_{step}.pth cannot be'):
        save(hook, runner, step)
    assert names(tmp_path) == ['iter_1.pth', 'last_checkpoint']
    with pytest.raises(SystemExit), mistakes.one_sentence():
        raise CheckpointError('said once')
    assert capsys.readouterr().err.startswith('error: said once\n')


def test_checkpoint_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    hook, runner = start(tmp_path)

    def fails_with(error):
        def fail(*_, **__):
            raise error
        monkeypatch.setattr(runner, 'save_checkpoint', fail)

    for error in (MemoryError(), RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried")):
        fails_with(error)
        save(hook, runner, 1)
    assert len(runner.said) == 2
    fails_with(RuntimeError('a bug'))
    with pytest.raises(RuntimeError, match='a bug'):
        save(hook, runner, 1)


def killed_while_writing(work_dir):
    hook, runner = start(work_dir)
    save(hook, runner, 1)
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(hook, runner, 2)


def test_checkpoint_of_a_process_killed_while_writing(tmp_path):
    assert in_a_process(killed_while_writing, tmp_path) == -signal.SIGKILL
    left = names(tmp_path)
    assert left[0].startswith('.iter_2.pth.') and left[0].endswith('.tmp')
    assert left[1:] == ['iter_1.pth', 'last_checkpoint']
    start(tmp_path)
    assert names(tmp_path) == ['iter_1.pth', 'last_checkpoint']


def test_checkpoint_is_on_the_disk_before_it_has_its_name(
        tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, 'fsync', lambda handle: done.append('sync') or fsync(handle))
    monkeypatch.setattr(
        os, 'replace', lambda *p: done.append('name') or replace(*p))
    hook, runner = start(tmp_path)
    save(hook, runner, 1)
    # File, name, folder; then the same for last_checkpoint.
    assert done == ['sync', 'name', 'sync'] * 2
    done.clear()
    with written_whole(tmp_path / 'other') as file:
        file.write(b'x')
    assert done == ['name']


def test_checkpoint_that_is_the_best(tmp_path):
    hook, runner = start(tmp_path, save_best='mIoU')
    for step, score in ((1, 10.), (2, 9.), (3, 20.)):
        save(hook, runner, step)
        runner.iter = step
        hook.after_val_epoch(runner, dict(mIoU=score))
    best = [there for name, there in runner.saves
            if name == 'best_mIoU_iter_3.pth']
    assert 'best_mIoU_iter_1.pth' in best[0]
    assert names(tmp_path) == [
        'best_mIoU_iter_3.pth', 'iter_1.pth', 'iter_2.pth', 'iter_3.pth',
        'last_checkpoint']
    hub = torch.load(tmp_path / 'iter_3.pth', weights_only=True)['hub']
    assert hub['best_score'] == 20.

    save(hook, runner, 4)
    runner.iter = 4
    with full_disk():
        hook.after_val_epoch(runner, dict(mIoU=30.))
    assert 'the best checkpoint cannot be written' in runner.said[-1]
    assert runner.message_hub.get_info('best_score') == 20.
    assert hook.best_ckpt_path == str(tmp_path / 'best_mIoU_iter_3.pth')
    assert 'best_mIoU_iter_3.pth' in names(tmp_path)


def test_checkpoint_interval_and_accumulated_gradients(tmp_path):
    runner = Runner(tmp_path)
    runner.optim_wrapper = SimpleNamespace(_accumulative_counts=2)
    for interval, warned in ((4, 0), (3, 1)):
        hook = SafeCheckpointHook(by_epoch=False, interval=interval)
        hook.before_train(runner)
        assert len(runner.said) == warned


def test_checkpoint_has_averaged_norms(tmp_path, monkeypatch):
    averaged = []
    monkeypatch.setattr(norm_sync, 'get_world_size', lambda: 2)
    monkeypatch.setattr(norm_sync, 'average_norm_statistics',
                        lambda model: averaged.append(runner.iter + 1))
    runner = Runner(tmp_path)
    runner.model, runner.train_loop = torch.nn.Identity(), None
    runner.hooks = [SafeCheckpointHook(by_epoch=False, interval=3)]
    for runner.iter in range(7):
        norm_sync.NormSyncHook().after_train_iter(runner, runner.iter)
    assert averaged == [3, 6]


def test_checkpoint_option_that_is_unknown():
    with pytest.raises(ValueError, match='default_hooks.checkpoint.on_error'):
        SafeCheckpointHook(on_error='ignore')


# -- content ---------------------------------------------------------------
@contextmanager
def torch_alone():
    """Without the classes that this package lets torch read."""
    safe = getattr(torch.serialization, 'get_safe_globals', list)()
    if safe:
        torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        if safe:
            torch.serialization.add_safe_globals(safe)


def test_checkpoint_is_plain(tmp_path):
    history = HistoryBuffer(max_length=50)
    for number in (1., 2.5):
        history.update(number, 2)
    weights = OrderedDict(weight=torch.ones(2), extra=np.float32(2))
    weights._metadata = OrderedDict()
    metadata = weights._metadata
    said = []
    checkpoint = dict(
        state_dict=weights,
        meta=dict(iter=np.int64(3), cfg='text', seed=None,
                  dataset_meta=ConfigDict(
                      classes=('a', np.str_('b')),
                      palette=np.array([[1, 2, 3]]))),
        message_hub=dict(
            log_scalars=OrderedDict({'train/loss': history}),
            runtime_info=OrderedDict(
                best_score=np.float64(1.5), path=Path('x/y'),
                thing=object(), nested=[1, object()])),
        optimizer=dict(state={0: dict(step=torch.ones(1))},
                       param_groups=[dict(params=[0], betas=(0.9, 0.99))]),
        param_schedulers=[dict(begin=0, formula=torch.sin, why=max)],
        strange=SimpleNamespace())
    logger = MMLogger.get_instance('plain')
    logger.handlers.clear()
    logger.handle = lambda record: said.append(record.getMessage())
    make_plain(checkpoint)
    torch.save(checkpoint, tmp_path / 'a.pth')
    with torch_alone():
        read = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert read['meta'] == dict(
        iter=3, cfg='text', seed=None,
        dataset_meta=dict(classes=('a', 'b'), palette=[[1, 2, 3]]))
    assert type(read['meta']['iter']) is int
    assert read['message_hub']['runtime_info'] == dict(
        best_score=1.5, path='x/y')
    assert read['state_dict']['extra'] == 2
    assert checkpoint['state_dict']._metadata is metadata
    assert read['optimizer']['param_groups'][0]['betas'] == (0.9, 0.99)
    assert read['param_schedulers'] == [dict(begin=0)]
    assert 'strange' not in read
    assert [line.split(' is a ')[0] for line in said] == [
        'checkpoint: message_hub.runtime_info.thing',
        'checkpoint: message_hub.runtime_info.nested', 'checkpoint: strange']
    restore_histories(read)
    again = read['message_hub']['log_scalars']['train/loss']
    assert isinstance(again, HistoryBuffer) and again.max_length == 50
    for one, two in zip(again.data, history.data, strict=True):
        assert one.dtype == two.dtype and (one == two).all()
    again.update(3., 1)
    assert again.mean() == pytest.approx((1 + 2.5 + 3) / 5)


def test_checkpoint_of_mmengine_is_left_as_it_is():
    history = HistoryBuffer([1.], [1])
    for other in ({}, dict(message_hub=None), dict(message_hub=dict(
            log_scalars=dict(loss=history)))):
        restore_histories(other)
    assert other['message_hub']['log_scalars']['loss'] is history


# -- files -----------------------------------------------------------------
@pytest.fixture
def good(tmp_path):
    path = tmp_path / 'iter_4.pth'
    torch.save(dict(weight=torch.arange(5000.)), path)
    return path


@pytest.mark.parametrize('part', [0.001, 0.3, 0.5, 0.9, 0.999])
def test_checkpoint_that_is_truncated(good, part):
    assert damage(good) is None
    whole = good.read_bytes()
    good.write_bytes(whole[:int(part * len(whole))])
    assert damage(good) == 'is truncated or damaged'


def test_checkpoint_that_is_damaged(good):
    whole = bytearray(good.read_bytes())
    whole[len(whole) // 2] ^= 1  # one bit of a weight
    good.write_bytes(whole)
    assert damage(good) == 'is truncated or damaged'
    good.write_bytes(bytes(len(whole)))  # lost with the power
    assert damage(good) == 'is no checkpoint'
    good.write_bytes(b'')
    assert damage(good) == 'is empty'
    good.unlink()
    assert damage(good) == 'cannot be read (No such file or directory)'


def test_checkpoint_of_an_old_torch(good):
    torch.save(dict(a=torch.ones(3)), good,
               _use_new_zipfile_serialization=False)
    assert damage(good) is None


def test_checkpoint_order(tmp_path):
    for step in (2, 4, 10, 40):
        (tmp_path / f'iter_{step}.pth').touch()
    for other in ('iter_x.pth', 'best_mIoU_iter_7.pth', 'epoch_5.pth'):
        (tmp_path / other).touch()

    def order():
        return [path.name for path in to_try(
            tmp_path, tmp_path, 'iter_{}.pth')]

    assert order() == [
        'iter_40.pth', 'iter_10.pth', 'iter_4.pth', 'iter_2.pth']
    pointer = tmp_path / 'last_checkpoint'
    pointer.write_text('')
    assert order()[0] == 'iter_40.pth'
    # iter_40 is of an earlier run; the folder was elsewhere.
    pointer.write_text('/another/machine/iter_10.pth\n')
    assert order() == ['iter_10.pth', 'iter_4.pth', 'iter_2.pth']
    assert to_try(tmp_path, tmp_path, 'iter_{}.pth')[0].exists()
    pointer.write_text('iter_5.pth')
    assert order() == ['iter_5.pth', 'iter_4.pth', 'iter_2.pth']


def choose(work_dir, **options):
    runner = Runner(work_dir, **options)
    SafeCheckpointHook(by_epoch=False, interval=1).before_run(runner)
    return runner


def test_checkpoint_to_resume_from(tmp_path):
    assert choose(tmp_path, resume=True)._load_from is None  # a first start
    hook, runner = start(tmp_path)
    for step in (1, 2, 3):
        save(hook, runner, step)
    third, second = tmp_path / 'iter_3.pth', tmp_path / 'iter_2.pth'
    assert choose(tmp_path)._load_from is None
    runner = choose(tmp_path, resume=True)
    assert runner._load_from == str(third) and not runner.said
    third.write_bytes(third.read_bytes()[:-100])
    second.write_bytes(b'')
    runner = choose(tmp_path, resume=True)
    assert runner._load_from == str(tmp_path / 'iter_1.pth')
    assert runner.said == [
        f'--resume: {third} is truncated or damaged; skipped, iter_1.pth is '
        'used',
        f'--resume: {second} is empty; skipped, iter_1.pth is used']
    (tmp_path / 'iter_1.pth').unlink()
    with pytest.raises(ValueError, match='no checkpoint can be read '
                       '.*iter_3.pth is truncated.*iter_2.pth is empty.*'
                       'delete them and .*last_checkpoint'):
        choose(tmp_path, resume=True)


@pytest.mark.parametrize('resume', [False, True])
def test_checkpoint_that_is_named(tmp_path, good, resume):
    options = dict(load_from=str(good), resume=resume)
    assert choose(tmp_path, **options)._load_from == str(good)
    good.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f'^load_from: {good} is truncated'):
        choose(tmp_path, **options)
    choose(tmp_path, load_from='https://host/some.pth', resume=resume)


def test_checkpoint_folder_of_its_own(tmp_path):
    work_dir, out = tmp_path / 'run', tmp_path / 'out'
    work_dir.mkdir()
    runner = Runner(work_dir)
    hook = SafeCheckpointHook(by_epoch=False, interval=1, out_dir=str(out))
    hook.before_train(runner)
    for step in (1, 2):
        save(hook, runner, step)
    assert names(out / 'run') == ['iter_1.pth', 'iter_2.pth']
    assert names(work_dir) == ['last_checkpoint']
    (out / 'run' / 'iter_2.pth').write_bytes(b'')
    runner = Runner(work_dir, resume=True)
    SafeCheckpointHook(by_epoch=False, interval=1,
                       out_dir=str(out)).before_run(runner)
    assert runner._load_from == str(out / 'run' / 'iter_1.pth')


def test_checkpoint_hook_is_the_default_one():
    root = Path(__file__).resolve().parents[1]
    hooks = Config.fromfile(
        root / 'configs' / '_base_' / 'default_runtime.py').default_hooks
    assert hooks.checkpoint.type == 'SafeCheckpointHook'
    assert hooks.stop.type == 'StopSignalHook'
    assert hooks.memory.type == 'MemoryAdviceHook'
