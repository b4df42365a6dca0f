"""When a run stops for a signal, and what it saves."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook
from tiny_run import in_a_process

from mmseg_contrast.engine.hooks import NormSyncHook, StopSignalHook
from mmseg_contrast.engine.hooks import stop_signal as module


class Loop:
    """Calls what happens while it runs."""

    dataloader = dataloader_iterator = None

    def run(self, *acts):
        for act in acts:
            act()


class Runner:
    """As much of a runner as the hook needs."""

    def __init__(self, checkpoint, counts=1):
        self.iter, self.epoch, self.max_iters = 0, 0, 100
        self.hooks = [checkpoint] if checkpoint else []
        self.optim_wrapper = SimpleNamespace(_accumulative_counts=counts)
        self.train_loop = Loop()
        self.said, self.closed = [], []
        self.logger = SimpleNamespace(warning=self.said.append)
        self.visualizer = SimpleNamespace(
            close=lambda: self.closed.append(1))


class Checkpoints(CheckpointHook):
    def __init__(self, **options):
        super().__init__(**{**dict(by_epoch=False), **options})
        self.saved = []

    def _save_checkpoint_with_step(self, runner, step, meta):
        self.saved.append((step, meta))
        self.last_ckpt = f'folder/{self.filename_tmpl.format(step)}'


@pytest.fixture
def make():
    """A runner and a hook that listens; gives the signals back."""
    made = []

    def build(checkpoint=None, counts=1, **options):
        hook = StopSignalHook(**options)
        runner = Runner(checkpoint, counts)
        hook.before_train(runner)
        made.append((hook, runner))
        return hook, runner

    before = {one: signal.getsignal(one)
              for one in (signal.SIGTERM, signal.SIGUSR1)}
    yield build
    for hook, runner in made:
        hook.after_train(runner)
    assert before == {one: signal.getsignal(one) for one in before}


def send(runner, number=signal.SIGTERM):
    """A signal while the loop runs."""
    runner.train_loop.run(lambda: os.kill(os.getpid(), number))


def step(hook, runner):
    hook.after_train_iter(runner, runner.iter)
    runner.iter += 1


def test_signal_saves_and_exits_once(make):
    checkpoints = Checkpoints()
    hook, runner = make(checkpoints)
    step(hook, runner)
    send(runner)
    send(runner)
    with pytest.raises(SystemExit) as end:
        step(hook, runner)
    assert end.value.code == 143
    assert checkpoints.saved == [(2, dict(epoch=0, iter=2))]
    assert runner.closed
    assert runner.said[-1] == (
        'SIGTERM: --resume goes on from folder/iter_2.pth; exit code 143.')


def test_processes_forked_meanwhile_end_at_once(make):
    hook, runner = make()

    def target():
        send(runner)
        time.sleep(60)

    assert in_a_process(target) == -signal.SIGTERM
    assert hook._received == 0


def test_a_process_whose_training_failed_ends_at_once(make):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    hook, runner = make()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1] and hook._received == 0
    send(runner)  # nobody listens any more
    assert heard == [1, 1] and hook._received == 0
    hook.after_train(runner)
    signal.signal(signal.SIGTERM, before)


def test_signal_after_a_checkpoint_saves_no_other(make):
    checkpoints = Checkpoints()
    checkpoints.last_ckpt = 'folder/iter_1.pth'
    hook, runner = make(checkpoints)
    send(runner)
    with pytest.raises(SystemExit):
        step(hook, runner)
    assert checkpoints.saved == []


def test_other_signals_if_wanted(make):
    hook, runner = make(signals=['SIGTERM', 'SIGUSR1'])
    send(runner, signal.SIGUSR1)
    with pytest.raises(SystemExit) as end:
        step(hook, runner)
    assert end.value.code == 128 + signal.SIGUSR1
    assert 'nothing is saved' in runner.said[-1]


def test_accumulated_gradients_are_used_first(make):
    checkpoints = Checkpoints()
    hook, runner = make(checkpoints, counts=3)
    send(runner)
    step(hook, runner)
    step(hook, runner)
    hook.after_val_iter(runner, 0)
    with pytest.raises(SystemExit):
        step(hook, runner)
    assert checkpoints.saved[0][0] == 3


def test_epochs_are_not_saved_in_the_middle(make):
    checkpoints = Checkpoints(by_epoch=True)
    hook, runner = make(checkpoints)
    send(runner)
    with pytest.raises(SystemExit):
        step(hook, runner)
    assert checkpoints.saved == []
    assert 'the last checkpoint is None' in runner.said[-1]


def test_ranks_ask_each_other_now_and_then(make, monkeypatch):
    asked, synced = [], []
    monkeypatch.setattr(module, 'get_world_size', lambda: 2)
    monkeypatch.setattr(
        module, 'all_reduce',
        lambda told, op: asked.append(int(told)) or told.fill_(
            15 if len(asked) == 2 else 0))
    monkeypatch.setattr(NormSyncHook, 'average', lambda *_: synced.append(1))
    checkpoints = Checkpoints()
    hook, runner = make(checkpoints, interval=5)
    runner.hooks.append(NormSyncHook())
    with pytest.raises(SystemExit):
        for _ in range(20):
            step(hook, runner)
    assert asked == [0, 0] and runner.iter == 9
    assert checkpoints.saved[0][0] == 10 and synced


def test_ranks_do_not_ask_in_validation(make, monkeypatch):
    monkeypatch.setattr(module, 'get_world_size', lambda: 2)
    checkpoints = Checkpoints()
    hook, runner = make(checkpoints)
    runner.iter = 7
    hook.after_val_iter(runner, 0)
    assert checkpoints.saved == []
    send(runner)
    hook.after_val_iter(runner, 1)
    hook.after_val_iter(runner, 2)
    assert checkpoints.saved == [(7, dict(epoch=0, iter=7))]


def test_validation_alone_is_no_training():
    runner = Runner(None)
    hook = StopSignalHook()
    hook._received = 15
    hook.after_val_iter(runner, 0)


@pytest.mark.parametrize('options', [
    dict(signals=['SIGKILL']), dict(signals='TERM'),
    dict(signals=['SIGNOTHING']), dict(interval=0)])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match='StopSignalHook'):
        StopSignalHook(**options)
