"""Killed, stopped or failed runs that go on as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from mmengine.model import is_model_wrapper
from tiny_run import CROP, content, in_a_process, quick_runs, same, train

from datasets_common import files_pipeline, folder, streets, write_folder
from mmseg_contrast.engine import loader as loader_module
from mmseg_contrast.engine.checkpoint_files import damage
from mmseg_contrast.engine.loader import PositionedIterator

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).resolve().parents[1]
SEED = dict(randomness=dict(seed=3))


@pytest.fixture(scope='module')
def quick():
    with quick_runs():
        yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory, quick):
    """Losses and last checkpoint of a run that nothing happened to."""
    work_dir = tmp_path_factory.mktemp('whole')
    losses, _ = train(work_dir, iterations=8, interval=4, **SEED)
    return losses, content(work_dir / 'iter_8.pth')


def assert_as_if_nothing_happened(whole, losses, last, first):
    """Losses from an iteration on, and all state in the end."""
    expected, reference = whole
    assert sorted(losses) == list(range(first, 9))
    for step in losses:
        assert losses[step] == expected[step], step
    last = content(last)
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        same(last[part], reference[part], part)
    # Logged scalars of all iterations, also of those before.
    for name, history in reference['message_hub']['log_scalars'].items():
        if 'time' not in name:
            same(last['message_hub']['log_scalars'][name], history, name)


def killed(work_dir):
    train(work_dir, iterations=8, interval=4, workers=2, at=5,
          act=lambda runner: os.kill(os.getpid(), signal.SIGKILL), **SEED)


def test_resume_after_kill_9_is_exact(whole, tmp_path):
    """Another number of workers, the seed from the checkpoint, and a latest
    checkpoint of which half is missing."""
    assert in_a_process(killed, tmp_path) == -signal.SIGKILL
    good = tmp_path / 'iter_4.pth'
    assert damage(good) is None
    torn = tmp_path / 'iter_5.pth'
    torn.write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    (tmp_path / 'last_checkpoint').write_text(str(torn))
    losses, runner = train(tmp_path, iterations=8, interval=4, workers=1,
                           resume=True)
    assert_as_if_nothing_happened(
        whole, losses, tmp_path / 'iter_8.pth', first=5)
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert (f'--resume: {torn} is truncated or damaged; skipped, iter_4.pth '
            'is used') in log
    assert 'not HistoryBuffer' not in log
    # The bank and the teacher had something to forget.
    state = content(good)['state_dict']
    assert state['auxiliary_head.bank.keys'].abs().sum() > 0
    assert state['teachers.ema.steps.count'] == 4


def preempted(work_dir):
    os.setsid()

    def signal_the_job(runner):
        # As Slurm does: also the loader's workers, which die of it.
        os.killpg(0, signal.SIGTERM)

    train(work_dir, iterations=8, interval=4, workers=2, at=4,
          act=signal_the_job, **SEED)


def test_resume_after_sigterm_is_exact(whole, tmp_path):
    """Saved where accumulated gradients are used up: after iteration 6."""
    assert in_a_process(preempted, tmp_path) == 143
    saved = sorted(path.name for path in tmp_path.glob('*.pth'))
    assert saved == ['iter_4.pth', 'iter_6.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('iter_6.pth')
    losses, _ = train(tmp_path, iterations=8, interval=4, workers=0,
                      resume=True)
    assert_as_if_nothing_happened(
        whole, losses, tmp_path / 'iter_8.pth', first=7)


def preempted_in_validation(work_dir):
    def signal_in_validation(runner):
        runner.val_loop.run_iter = stop(runner.val_loop.run_iter)

    def stop(run):
        def wrapped(*batch):
            os.kill(os.getpid(), signal.SIGTERM)
            run(*batch)
        return wrapped

    train(work_dir, iterations=6, interval=2, val=True, at=1,
          act=signal_in_validation,
          checkpoint=dict(save_best='mIoU'), **SEED)


def test_sigterm_in_validation_waits_for_nothing(tmp_path):
    assert in_a_process(preempted_in_validation, tmp_path) == 143
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_2.pth']


def rank(number, port, work_dir):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number),
                      WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    torch.distributed.init_process_group('gloo')

    def signal_one(runner):
        assert is_model_wrapper(runner.model)
        runner.hooks[-1].at = None
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train(work_dir, iterations=20, interval=10, at=0, act=signal_one,
          launcher='pytorch', model_wrapper_cfg=dict(
              type='MMDistributedDataParallel', broadcast_buffers=False,
              device_ids=None),
          stop=dict(interval=4), **SEED)


def test_ranks_stop_together_though_one_is_signalled(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')
    ranks = [context.Process(target=rank, args=(i, port, tmp_path))
             for i in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(120)
    assert [one.exitcode for one in ranks] == [143, 143]
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_4.pth']
    assert damage(tmp_path / 'iter_4.pth') is None


def test_a_killed_worker_is_replaced(whole, tmp_path):
    def kill_workers(runner):
        running = runner.train_loop.dataloader_iterator
        while not hasattr(running, '_workers'):
            running = running._iterator
        for worker in running._workers:
            os.kill(worker.pid, signal.SIGKILL)

    losses, runner = train(tmp_path, iterations=8, interval=4, workers=2,
                           at=5, act=kill_workers, **SEED)
    assert_as_if_nothing_happened(
        whole, losses, tmp_path / 'iter_8.pth', first=1)
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('New workers go on with the same samples') == 1


class DyingLoader:
    """Gives the sampler's position; every second batch kills a worker."""

    def __init__(self):
        self.start = self.given = 0

    def skip(self, samples):
        self.start = samples

    def __iter__(self):
        for position in range(self.start, self.start + 2):
            if position == self.start + 1:
                raise RuntimeError('DataLoader worker (pid(s) 7) exited')
            self.given += 1
            yield position


def test_workers_that_keep_dying_end_the_run(monkeypatch):
    loader = DyingLoader()
    one = PositionedIterator(
        loader, iter(loader), loader, lambda: loader.given, resumed=False)
    assert [next(one) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match='num_workers.*--resume'):
        next(one)
    # So many in a long time are no reason to end.
    monkeypatch.setattr(loader_module, 'BATCHES', 2)
    loader = DyingLoader()
    one = PositionedIterator(
        loader, iter(loader), loader, lambda: loader.given, resumed=False)
    assert [next(one) for _ in range(20)] == list(range(20))


def test_other_errors_of_a_loader_are_left_alone():
    def broken():
        yield 1
        raise RuntimeError('something else')

    one = PositionedIterator(None, broken(), None, lambda: 0, resumed=False)
    assert next(one) == 1
    with pytest.raises(RuntimeError, match='^something else$'):
        next(one)


def test_resume_after_too_little_memory_is_exact(whole, tmp_path):
    """In the middle of an iteration: the student has seen the source."""
    def exhaust(runner):
        def fail(*_):
            raise torch.cuda.OutOfMemoryError('CUDA out of memory.')

        runner.model.segmentor.decode_head.register_forward_hook(fail)

    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(tmp_path, iterations=8, interval=4, at=5, act=exhaust, **SEED)
    assert damage(tmp_path / 'iter_4.pth') is None
    losses, runner = train(tmp_path, iterations=8, interval=4, resume=True)
    assert_as_if_nothing_happened(
        whole, losses, tmp_path / 'iter_8.pth', first=5)
    first = min(tmp_path.glob('*/*.log'))
    assert 'Out of memory on the CPU in iteration 6. ' in first.read_text()


def test_a_file_that_disappears_is_named_and_the_run_resumed(tmp_path):
    write_folder(tmp_path / 'data', count=3, size=(32, 48))
    moved = tmp_path / 'moved'
    target = folder(tmp_path / 'data', files_pipeline(CROP, labels=False),
                    classes=None)
    options = dict(
        iterations=9, interval=2, workers=2,
        train_dataloader_streams=dict(
            source=dict(dataset=streets('source', 7, CROP)),
            target=dict(labelled=False, dataset=target)))
    images = tmp_path / 'data' / 'img_dir'

    def lose(runner):
        shutil.move(images, moved)

    with pytest.raises(ValueError, match='img_dir/00.*FileNotFoundError'):
        train(tmp_path / 'work', at=2, act=lose, **options)
    last = Path((tmp_path / 'work' / 'last_checkpoint').read_text())
    assert damage(last) is None
    first = int(last.stem.partition('_')[2]) + 1
    shutil.move(moved, images)
    losses, _ = train(tmp_path / 'work', resume=True, **options)
    assert sorted(losses) == list(range(first, 10))


def tool(work_dir, workers):
    """``tools/train.py --resume`` on the quickstart config, in 8 steps."""
    streams = 'train_dataloader.dataset.streams'
    return subprocess.Popen(
        [sys.executable, 'tools/train.py', 'configs/quickstart/uda.py',
         '--resume', '--work-dir', str(work_dir), '--cfg-options',
         f'{streams}.source.dataset.num_images=12',
         f'{streams}.target.dataset.num_images=10',
         'train_dataloader.batch_size=2', 'train_cfg.max_iters=8',
         f'train_dataloader.num_workers={workers}',
         f'train_dataloader.persistent_workers={workers > 0}',
         'train_cfg.val_interval=100', 'val_dataloader.num_workers=0',
         'val_dataloader.persistent_workers=False',
         'model.pseudo_labels.target.threshold=0.11',
         'default_hooks.checkpoint.interval=2', 'randomness.seed=3'],
        cwd=ROOT, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, start_new_session=True,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))


@pytest.mark.slow
def test_resume_of_the_tool_killed_again_and_again(tmp_path):
    """kill -9 of the whole job at any time, and one SIGTERM."""
    reference = tmp_path / 'whole'
    assert tool(reference, 0).wait(600) == 0
    parts = tmp_path / 'parts'
    random = Random(1)
    for step, workers, number in (
            (2, 2, signal.SIGKILL), (4, 1, signal.SIGKILL),
            (6, 3, signal.SIGTERM)):
        process = tool(parts, workers)
        while not (parts / f'iter_{step}.pth').exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        os.killpg(process.pid, number)
        code = process.wait(60)
        # Where SIGTERM comes too late there is nothing left to stop.
        assert code == -number if number == signal.SIGKILL else (
            code in (0, 143))
    assert tool(parts, 2).wait(600) == 0
    one, two = (content(path / 'iter_8.pth') for path in (reference, parts))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        same(two[part], one[part], part)
    assert not [path for path in parts.iterdir() if path.suffix == '.tmp']
