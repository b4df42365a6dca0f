"""One training iteration of each method never waits for the device."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import build_from_cfg
from mmseg.registry import HOOKS
from torch import nn

from helpers import batch
from methods import tiny_model
from sync_watch import watch_syncs

METHODS = ('dacs', 'daformer', 'mic-hrda', 'cluda', 'sepico-dist',
           'sepico-bank', 'pipa')


class Loader(list):
    dataset = SimpleNamespace(metainfo=dict(
        classes=[str(c) for c in range(19)]))


def on_device(model):
    """All tensors of a model."""
    found = [*model.parameters(), *model.buffers()]
    for objective in model.objectives.values():
        encoder = getattr(objective, 'encoder', None)
        if encoder is not None:
            found += [*encoder.parameters(), *encoder.buffers()]
    return found


@pytest.mark.parametrize('name', METHODS)
def test_train_step_and_hooks_wait_in_log_intervals_only(name):
    cfg, model = tiny_model(name)
    options = dict(cfg.optim_wrapper, clip_grad=dict(max_norm=1.))
    hooks = [
        dict(cfg.default_hooks.runtime_info),
        dict(type='PseudoLabelHealthHook', interval=3, report_interval=3)]
    if any('Contrast' in type(part).__name__ for part in
           model.segmentor.modules()):
        hooks.append(dict(
            type='ContrastHealthHook', interval=3, report_interval=3))
    hooks = [build_from_cfg(hook, HOOKS) for hook in hooks]
    hub = MessageHub.get_instance(f'no waiting {name}')
    hub.update_info('max_iters', 100)
    runner = SimpleNamespace(
        model=model, iter=0, epoch=0, max_epochs=1, max_iters=100,
        hooks=[LoggerHook(interval=3)], message_hub=hub,
        optim_wrapper=build_optim_wrapper(model, options),
        train_dataloader=Loader(range(1000)),
        visualizer=SimpleNamespace(add_scalars=lambda *args, **kwargs: None))
    for hook in hooks:
        hook.before_train(runner)
    waited = []
    with watch_syncs(*on_device(model)) as watch:
        for runner.iter in range(4):
            # A batch comes from the host.
            data = batch((64, 64), num_classes=model.num_classes,
                         seed=runner.iter)
            model.train()
            for hook in hooks:
                hook.before_train_iter(runner, runner.iter, data)
            outputs = model.train_step(data, runner.optim_wrapper)
            for hook in hooks:
                hook.after_train_iter(runner, runner.iter, data, outputs)
            waited.append(watch.found[:])
            watch.found.clear()
    # In the first one a teacher that gives features looks at its losses.
    assert not waited[0] or 'losses.py' in waited[0][0]
    # The third one is logged: there the watch sees the host wait.
    assert waited[1] == waited[3] == []
    assert any('tolist' in one for one in waited[2])
    assert len(hub.get_scalar('train/loss').data[0]) == 3
    assert len(hub.get_scalar('train/grad_norm').data[0]) == 3


def test_a_step_walks_through_no_modules(monkeypatch):
    cfg, model = tiny_model('daformer')
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = [batch((64, 64), num_classes=19, seed=i) for i in range(2)]
    model.train()
    model.train_step(data[0], wrapper)  # what is looked up once is kept
    seen = []
    stock = nn.Module.named_modules

    def counted(self, *args, **kwargs):
        for one in stock(self, *args, **kwargs):
            seen.append(one[0])
            yield one

    trained = []
    monkeypatch.setattr(nn.Module, 'named_modules', counted)
    monkeypatch.setattr(nn.Module, 'train', lambda self, mode=True:
                        trained.append(self) or self)
    model.train()
    model.train_step(data[1], wrapper)
    assert trained == []
    # The teacher looks at one parameter, whether the student is the same.
    assert len(seen) < 50 < 300 < len(list(stock(model)))


def test_modes_change_when_they_are_asked_for():
    _, model = tiny_model('dacs')
    teacher = model.teachers['ema']
    assert all(part.training for part in model.segmentor.modules())
    model.eval()
    assert not any(part.training for part in model.segmentor.modules())
    assert not any(part.training for part in teacher.model.modules())
    model.train()
    assert all(part.training for part in model.segmentor.modules())
    assert teacher.training and any(
        part.training for part in teacher.model.modules())
    # The student's mode was changed behind the model's back.
    model.segmentor.eval()
    model.train()
    assert all(part.training for part in model.segmentor.modules())


@pytest.mark.parametrize('read', [
    lambda x: x.sum().item(), lambda x: bool((x > 0).any()),
    lambda x: float(x.sum()), lambda x: x.tolist(), lambda x: x.numpy(),
    lambda x: x.cpu(), lambda x: x[x > 0], lambda x: (x > 0).nonzero(),
    lambda x: x.unique(), lambda x: x.masked_select(x > 0),
    lambda x: torch.where(x > 0), lambda x: torch.equal(x, x),
    lambda x: x.long().bincount(), lambda x: 1 if x.sum() > 0 else 2,
    lambda x: x[[1, 0]], lambda x: x[torch.tensor([1, 0])],
    lambda x: x + torch.ones(4), lambda x: x.new_tensor([1.]),
    lambda x: torch.tensor([1.], device=x.device),
    lambda x: torch.rand(4).to(x.device), lambda x: torch.rand(4).to(x),
    lambda x: x.copy_(torch.rand(4))])
def test_the_watch_sees_what_waits(read):
    weights = torch.ones(4)
    net = nn.Conv1d(1, 1, 1)
    with watch_syncs(weights) as watch:
        # Derived through a module, and by writing into a new tensor.
        computed = net(weights.view(1, 1, 4)).detach().abs().flatten()
        copied = torch.zeros(4)
        copied[:2] = computed[:2]
        read(copied)
    assert watch.found


def test_the_watch_allows_draws_on_the_host():
    weights = torch.ones(4)
    with watch_syncs(weights) as watch:
        draw = torch.rand(4)
        total = float(draw.sum()) + len(draw.tolist())
        result = weights * draw.to(weights.device, non_blocking=True) + total
        result = result + torch.zeros(4, device=weights.device)
        result[torch.arange(2, device=weights.device)]
        torch.where(result > 0, result, 0.) * torch.tensor(2.)
    assert watch.found == []
