"""Scalars stay on the device until they are logged, and are the same."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from helpers import tiny_student
from mmseg_contrast.engine.checkpoint_content import restore_histories
from mmseg_contrast.engine.hooks.runtime_info import (
    DeferredRuntimeInfoHook,
    DeferredScalars,
    extend_history,
)
from sync_watch import watch_syncs

ROOT = Path(__file__).resolve().parent.parent


# -- the parts -------------------------------------------------------------


def test_scalars_come_back_exactly_and_in_order():
    kept = DeferredScalars()
    assert not kept
    # No common type holds both numbers: 2 ** 53 + 1 and a third.
    kept.add(dict(a=torch.tensor(1 / 3), b=torch.tensor(2**53 + 1)))
    kept.add(dict(b=torch.tensor(.1, dtype=torch.float64)))
    kept.add(dict(a=torch.tensor([[7.]]), c=torch.tensor(
        .1, dtype=torch.bfloat16)))
    assert kept
    assert kept.take() == dict(
        a=[float(np.float32(1 / 3)), 7.], b=[2**53 + 1, .1],
        c=[float(torch.tensor(.1, dtype=torch.bfloat16))])
    assert not kept and kept.take() == {}


def test_scalars_are_copies_without_a_graph():
    value = torch.ones((), requires_grad=True)
    kept = DeferredScalars()
    total = value * 2
    kept.add(dict(loss=total))
    with torch.no_grad():
        total.fill_(5)
    (rows, ) = kept._rows.values()
    assert rows[0][2].grad_fn is None
    assert kept.take() == dict(loss=[2.])


@pytest.mark.parametrize('before', [0, 1, 4])
def test_a_history_is_extended_as_by_single_updates(before):
    one, other = (MessageHub(name) for name in ('one', 'other'))
    values = [.5, 2., -1., 3., 1e-9]
    for hub in (one, other):
        for value in values[:before]:
            hub.update_scalar('train/x', value)
    for value in values[before:]:
        one.update_scalar('train/x', value)
    extend_history(other, 'train/x', values[before:])
    for mine, theirs in zip(other.log_scalars['train/x'].data,
                            one.log_scalars['train/x'].data, strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    assert other.state_dict()['resumed_keys'] == (
        one.state_dict()['resumed_keys'])


def test_a_history_has_its_length_at_most():
    hub = MessageHub('short')
    hub.log_scalars['train/x'] = HistoryBuffer([1., 2.], [1, 1], max_length=3)
    extend_history(hub, 'train/x', [3., 4.])
    assert hub.log_scalars['train/x'].data[0].tolist() == [2., 3., 4.]
    assert hub.log_scalars['train/x'].max_length == 3


# -- the hook --------------------------------------------------------------


def fake_runner(name, wrapper=None, interval=3):
    logger = LoggerHook(interval=interval)
    return SimpleNamespace(
        hooks=[logger], iter=0, epoch=0, max_epochs=1, max_iters=100,
        message_hub=MessageHub(name), optim_wrapper=wrapper or OptimWrapper(
            torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)),
        train_dataloader=SimpleNamespace(
            dataset=None, __len__=lambda: 1000))


class Loader(list):
    dataset = None


def history(runner, key='train/loss'):
    buffer = runner.message_hub.log_scalars.get(key)
    return [] if buffer is None else buffer.data[0].tolist()


def start(name, hook, **options):
    runner = fake_runner(name, **options)
    runner.train_dataloader = Loader(range(1000))
    hook.before_train(runner)
    return runner


def iterate(hook, runner, iterations):
    for _ in range(iterations):
        hook.after_train_iter(runner, runner.iter, outputs=dict(
            loss=torch.tensor(float(runner.iter)), number=runner.iter))
        runner.iter += 1


def test_scalars_move_when_a_logger_writes():
    hook = DeferredRuntimeInfoHook()
    runner = start('moves', hook)
    iterate(hook, runner, 2)
    assert history(runner) == []
    assert history(runner, 'train/number') == [0, 1]  # on the host anyway
    iterate(hook, runner, 1)
    assert history(runner) == [0., 1., 2.]
    iterate(hook, runner, 2)
    assert history(runner) == [0., 1., 2.]
    hook.after_train(runner)
    assert history(runner) == [0., 1., 2., 3., 4.]


def test_an_interval_of_its_own_and_the_end_of_an_epoch():
    hook = DeferredRuntimeInfoHook(interval=2)
    runner = start('own', hook, interval=50)
    iterate(hook, runner, 2)
    assert history(runner) == [0., 1.]
    runner.train_dataloader = Loader(range(3))
    iterate(hook, runner, 1)
    assert history(runner) == [0., 1., 2.]
    with pytest.raises(ValueError, match='interval'):
        DeferredRuntimeInfoHook(interval=0)


def test_a_checkpoint_holds_the_latest_scalars():
    hook = DeferredRuntimeInfoHook()
    runner = start('saved', hook)
    iterate(hook, runner, 2)
    checkpoint = dict(message_hub=runner.message_hub.state_dict())
    assert 'train/loss' not in checkpoint['message_hub']['log_scalars']
    hook.before_save_checkpoint(runner, checkpoint)
    saved = checkpoint['message_hub']['log_scalars']['train/loss']
    assert saved.data[0].tolist() == [0., 1.]
    same = checkpoint['message_hub']
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint['message_hub'] is same  # nothing new


def test_what_is_no_scalar_is_refused_as_ever():
    hook = DeferredRuntimeInfoHook()
    runner = start('refused', hook)
    with pytest.raises(AssertionError):
        hook.after_train_iter(runner, 0, outputs=dict(x=torch.ones(2)))


def clipped_steps(hook, kind, options):
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    MessageHub.get_instance(f'clip {kind} {hook is None} {options}')
    wrappers = [OptimWrapper(torch.optim.SGD(net.parameters(), 0.1),
                             clip_grad=dict(options)) for net in nets]
    wrapper = wrappers[0]
    if kind == 'dict':
        wrapper = OptimWrapperDict(a=wrappers[0], b=wrappers[1])
    runner = None
    if hook is not None:
        runner = start(f'clip {kind} {options}', hook, wrapper=wrapper)
        hook.before_train(runner)  # twice does no harm
    inputs = torch.randn(4, 3)
    with watch_syncs(inputs, *nets[0].parameters(),
                     *nets[1].parameters()) as watch:
        for i in range(3):
            for net, one in zip(nets, wrappers, strict=True):
                if kind == 'dict' or net is nets[0]:
                    one.update_params((net(inputs + i)**2).sum())
    if hook is None:
        logged = wrappers[0].message_hub.log_scalars
    else:
        hook.flush(runner)
        logged = runner.message_hub.log_scalars
    return nets, watch.found, {
        key: value.data[0].tolist() for key, value in logged.items()}


@pytest.mark.parametrize('kind', ['one', 'dict'])
def test_clipping_without_waiting_for_its_norm(kind):
    options = dict(max_norm=0.5)
    stock, waited, wanted = clipped_steps(None, kind, options)
    ours, waiting, found = clipped_steps(
        DeferredRuntimeInfoHook(), kind, options)
    number = 3 if kind == 'one' else 6
    assert len(wanted['train/grad_norm']) == number == len(waited)
    assert found['train/grad_norm'] == wanted['train/grad_norm']
    assert waiting == []
    for net, other in zip(ours, stock, strict=True):
        assert torch.equal(net.weight, other.weight)
    # The other kind of clipping has no norm.
    *_, found = clipped_steps(DeferredRuntimeInfoHook(), kind, dict(
        type='value', clip_value=0.1))
    assert 'train/grad_value' not in found


# -- whole runs ------------------------------------------------------------


def train(tmp_path, name, hook, monkeypatch):
    monkeypatch.setattr(Config, 'pretty_text', property(lambda _: 'x = 1'))
    config = Config.fromfile(str(ROOT / 'configs/quickstart/uda.py'))
    net = tiny_student(10, size=(128, 128))
    config.model.segmentor = net
    config.data_preprocessor = net['data_preprocessor']
    assert config.default_hooks.runtime_info.type == 'DeferredRuntimeInfoHook'
    config.merge_from_dict({
        'train_cfg.max_iters': 5, 'train_cfg.val_interval': 100,
        'default_hooks.checkpoint.interval': 3,
        'default_hooks.logger.interval': 2, 'log_processor.window_size': 2,
        'optim_wrapper.clip_grad': dict(max_norm=1.),
        'randomness': dict(seed=3)})
    if hook is not None:
        config.default_hooks.runtime_info.type = hook
    for stream in config.train_dataloader.dataset.streams.values():
        stream.dataset.num_images = 6
    config.train_dataloader.update(
        batch_size=2, num_workers=0, persistent_workers=False)
    config.custom_hooks = [
        dict(type='PositionHook'),
        dict(type='PseudoLabelHealthHook', interval=2, report_interval=4)]
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    config.work_dir = str(tmp_path / name)
    config.experiment_name = f'{tmp_path.name}_{name}'
    config.visualizer.name = config.experiment_name
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def written(runner):
    path, = Path(runner.work_dir).glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if 'time' not in key}
            for row in rows]


def text(runner):
    path, = Path(runner.work_dir).glob('*/*.log')
    lines = [line.split('Iter(train)')[1] for line in
             path.read_text().splitlines() if 'Iter(train)' in line]
    return [re.sub(r'(eta|time|data_time): \S+', '', line) for line in lines]


def test_logs_and_checkpoints_are_those_of_mmengine(tmp_path, monkeypatch):
    stock = train(tmp_path, 'stock', 'RuntimeInfoHook', monkeypatch)
    ours = train(tmp_path, 'ours', None, monkeypatch)
    rows = written(ours)
    assert sum('loss' in row for row in rows) == 2
    assert rows == written(stock)
    assert text(ours) == text(stock)
    assert any('grad_norm' in line for line in text(ours))
    for name in ('iter_3.pth', 'iter_5.pth'):
        one, other = (torch.load(Path(run.work_dir) / name,
                                 weights_only=True) for run in (ours, stock))
        for checkpoint in (one, other):
            restore_histories(checkpoint)
        one, other = one['message_hub'], other['message_hub']
        assert dict(one['resumed_keys']) == dict(other['resumed_keys'])
        mine, theirs = one['log_scalars'], other['log_scalars']
        assert mine.keys() == theirs.keys()
        for key in mine:
            if 'time' not in key:
                for a, b in zip(mine[key].data, theirs[key].data,
                                strict=True):
                    assert np.array_equal(a, b), key
