"""Many iterations in constant memory."""

import gc
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from datasets_common import streets
from helpers import tiny_student

ROOT = Path(__file__).resolve().parent.parent
MB = 2**20


def resident():
    """Bytes of this process that are in memory."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * 4096


def tensors():
    """Number of live tensors, and the bytes that they hold."""
    gc.collect()
    storages, number = {}, 0
    for one in gc.get_objects():
        # Others that tests left behind (fake ones) have no memory.
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            number += 1
            memory = one.untyped_storage()
            storages[memory.data_ptr()] = memory.nbytes()
    return number, sum(storages.values())


class Scales(Hook):
    """Weighs the process at the end of some iterations."""

    priority = 'LOWEST'

    def __init__(self, interval):
        self.interval = interval
        self.weights = []

    def after_train_iter(self, runner, batch_idx, data_batch=None,
                         outputs=None):
        if (runner.iter + 1) % self.interval == 0:
            # What it holds depends on the draws: an image that is not
            # augmented is the same in two views.
            runner.model.last_step = None
            self.weights.append((*tensors(), resident()))


def soak(work_dir, iterations, interval):
    """DACS with contrast, all hooks that look at steps, and checkpoints."""
    config = Config.fromfile(str(ROOT / 'configs/quickstart/uda.py'))
    net = tiny_student(10, dropout=.1)
    net['auxiliary_head'] = dict(
        type='ContrastHead', in_channels=8, in_index=1, num_classes=10,
        channels=6, bank=dict(type='MemoryBank', pixels=20, segments=20))
    config.model.segmentor = net
    config.model.pseudo_labels.target = dict(type='ClassThresholds')
    config.data_preprocessor = net['data_preprocessor']
    config.merge_from_dict({
        'model.objectives.contrast': dict(type='Contrast'),
        'train_cfg.max_iters': iterations,
        'train_cfg.val_interval': 10**6,
        'default_hooks.checkpoint.interval': interval,
        'default_hooks.checkpoint.max_keep_ckpts': 1,
        'default_hooks.logger.interval': 10,
        'log_processor.window_size': 10, 'randomness': dict(seed=3),
        'work_dir': str(work_dir), 'experiment_name': work_dir.name})
    config.custom_hooks = [
        *(one for one in config.custom_hooks
          if one.type not in ('UDAVisualizationHook',
                              'PseudoLabelHealthHook')),
        dict(type='UDAVisualizationHook', interval=interval // 2),
        dict(type='PseudoLabelHealthHook', interval=10, report_interval=20),
        dict(type='ContrastHealthHook', interval=10, report_interval=20)]
    config.param_scheduler = []
    loader = config.train_dataloader
    loader.batch_size, loader.num_workers = 2, 0
    loader.persistent_workers = False
    crop = dict(type='RandomCrop', crop_size=(32, 32))
    loader.dataset = dict(type='StreamDataset', streams=dict(
        source=dict(dataset=streets('source', 6, crop), cache=True),
        target=dict(labelled=False, cache=True,
                    dataset=streets('target', 6, crop))))
    config.val_cfg = config.val_dataloader = config.val_evaluator = None
    config.test_cfg = config.test_dataloader = config.test_evaluator = None
    runner = Runner.from_cfg(config)
    scales = Scales(interval)
    runner.register_hook(scales)
    runner.train()
    return scales.weights


def check(weights, settled, slack):
    """Constant from the first weighing after what is made only once."""
    first, *others = weights[settled:]
    assert others
    for number, size, _ in others:
        assert (number, size) == first[:2]
    assert max(one[2] for one in others) - first[2] < slack


@pytest.fixture(autouse=True)
def _no_layout(monkeypatch):
    # mmengine spends 5 s on the layout of a config wherever it writes one
    monkeypatch.setattr(Config, 'pretty_text', property(lambda _: 'x = 1'))


def test_soak_of_60_steps(tmp_path):
    check(soak(tmp_path, 60, 20), settled=1, slack=8 * MB)


@pytest.mark.slow
def test_soak_of_2000_steps(tmp_path):
    check(soak(tmp_path, 2000, 100), settled=4, slack=4 * MB)
