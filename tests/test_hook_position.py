"""A resumed run sees exactly the samples of an uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop
from mmseg.registry import DATASETS
from torch.utils.data import DataLoader, SequentialSampler

from datasets_common import streets
from mmseg_contrast.datasets import PositionSampler
from mmseg_contrast.engine.hooks import PositionHook
from mmseg_contrast.engine.loader import stop_workers

CROP = dict(type='RandomCrop', crop_size=(16, 24))


class Model(torch.nn.Module):
    """Keeps what it is fed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def train_step(self, data, optim_wrapper):
        self.seen.append(torch.stack(
            [x.double().sum() for key in ('source', 'target')
             for x in data['inputs'][key]]))
        return {}


class Visualizer:
    dataset_meta = None


class Runner:
    """As much of a runner as the train loop of mmengine needs."""

    def __init__(self, loader, max_iters, resume=0, seed=5, sampler=None):
        self.model, self.optim_wrapper = Model(), None
        self.visualizer, self.val_loop = Visualizer(), None
        self.seed, self._randomness_cfg = seed, dict(seed=seed)
        self.message_hub = MessageHub('position')
        self.cfg = Config(dict(train_dataloader=dict(
            sampler=sampler or dict(type='PositionSampler'))))
        self.train_dataloader = loader
        self.hooks = [PositionHook()]
        self.train_loop = self._train_loop = IterBasedTrainLoop(
            self, loader, max_iters=max_iters)
        self.train_loop._iter = resume

    iter = property(lambda self: self.train_loop.iter)

    def call_hook(self, name, **arguments):
        for hook in self.hooks:
            if name == 'before_train':
                getattr(hook, name)(self, **arguments)

    def run(self):
        self.train_loop.run()
        # left to the garbage collector, the workers would stop after 10 s
        stop_workers(self.train_dataloader,
                     self.train_loop.dataloader_iterator)
        return self.model.seen


def dataset():
    return DATASETS.build(dict(type='StreamDataset', streams=dict(
        source=dict(dataset=streets('source', 7, CROP)),
        target=dict(labelled=False, dataset=streets('target', 5, CROP)))))


def loader(workers=0, persistent=False, seed=5, data=None, sampler=None):
    data = data or dataset()
    return DataLoader(
        data, batch_size=2, num_workers=workers,
        persistent_workers=persistent, collate_fn=pseudo_collate,
        sampler=sampler or PositionSampler(data, seed=seed))


@pytest.fixture(scope='module')
def uninterrupted():
    return Runner(loader(), 6).run()


@pytest.mark.parametrize('workers, persistent', [(0, False), (2, False),
                                                 (2, True)])
@pytest.mark.parametrize('seed', [5, 99])
def test_resume_continues_exactly(uninterrupted, workers, persistent, seed):
    """Also when the checkpoint's seed differs from the config's."""
    again = Runner(loader(workers, persistent, seed=seed), 6, resume=4).run()
    assert len(again) == 2
    for a, b in zip(uninterrupted[4:], again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(again[0], again[1])


def test_no_skipped_sample_is_loaded(monkeypatch):
    data = dataset()
    positions, real = [], type(data).__getitem__
    monkeypatch.setattr(
        type(data), '__getitem__',
        lambda self, p: positions.append(p) or real(self, p))
    positions.clear()
    Runner(loader(data=data), 52, resume=50).run()
    assert positions == [100, 101, 102, 103]


def test_fast_forward_flag_of_the_fork(uninterrupted):
    runner = Runner(loader(), 6, resume=4)
    # onedl-mmengine then leaves the loader at its beginning
    runner.train_loop.fast_forward_on_resume = True
    for a, b in zip(uninterrupted[4:], runner.run(), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_run_starts_no_workers_anew():
    runner = Runner(loader(), 1)
    iterator = runner.train_loop.dataloader_iterator
    PositionHook().before_train(runner)
    assert runner.train_loop.dataloader_iterator._iterator is iterator


def test_a_pinned_seed_stays():
    made = loader(seed=7)
    Runner(made, 1, sampler=dict(type='PositionSampler', seed=7)).run()
    assert made.sampler.seed == made.dataset.seed == 7
    Runner(made, 1).run()
    assert made.sampler.seed == made.dataset.seed == 5


def test_seeds_that_differ_by_rank(monkeypatch):
    import mmseg_contrast.engine.hooks.position as module
    monkeypatch.setattr(module, 'get_rank', lambda: 3)
    made = loader(seed=7)
    runner = Runner(made, 1, seed=8)
    runner._randomness_cfg['diff_rank_seed'] = True
    runner.message_hub.update_info('seed', 5)  # the checkpoint's, of rank 0
    runner.run()
    assert made.dataset.seed == 5
    assert runner.message_hub.get_info('seed') == 8


def test_another_sampler_is_refused():
    data = dataset()
    made = loader(data=data, sampler=SequentialSampler(data))
    with pytest.raises(ValueError, match='`train_dataloader.sampler`'):
        Runner(made, 1).run()


def test_epochs_are_refused():
    runner = Runner(loader(), 1)

    class EpochLoop:
        iter = 0

    runner.train_loop = EpochLoop()
    with pytest.raises(ValueError, match='`train_cfg`.*EpochLoop'):
        PositionHook().before_train(runner)


def test_other_datasets_are_left_alone():
    made = DataLoader([1, 2, 3])
    runner = Runner(made, 1)
    PositionHook().before_train(runner)


def test_a_run_from_other_weights_starts_its_counts_at_0():
    from helpers import batch, build, run
    from mmseg_contrast.engine.hooks.position import restart_clocks
    model = build()
    run(model, batch())
    run(model, batch())
    assert model.clock.now() == model.teachers['ema'].steps.now() == 2
    restart_clocks(model)
    assert model.clock.now() == int(model.clock.count) == 0
    assert run(model, batch())['ema.momentum'] == 0


def test_model_and_data_have_the_same_number_of_classes():
    from types import SimpleNamespace as Fake

    from mmseg_contrast.engine.hooks.position import check_classes
    data = Fake(metainfo=dict(classes=('a', 'b', 'c')))
    check_classes(data, Fake(num_classes=3))
    with pytest.raises(ValueError, match='num_classes = 2.*are 3: a, b, c'):
        check_classes(data, Fake(num_classes=2))
