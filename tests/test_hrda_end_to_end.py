"""HRDA with MIC and CLUDA through the runner: train, validate, resume."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmseg.visualization import SegLocalVisualizer

ROOT = Path(__file__).resolve().parent.parent
#: As a user would write it, around the quickstart's network.
CONFIG = '''
_base_ = [
    {root!r} + '/configs/quickstart/uda.py',
    {root!r} + '/configs/_base_/uda/mic-target.py',
    {root!r} + '/configs/_base_/contrast/cluda-hrda.py',
]
model = dict(
    segmentor=dict(
        type='HRDASegmentor',
        decode_head=dict(
            _delete_=True,
            type='HRDAHead',
            head=_base_.model.segmentor.decode_head,
            attention=dict(channels=8, embed_dims=8)),
        detail_size=(64, 64),
        max_windows=5,
        test_cfg=dict(
            mode='slide', crop_size=(128, 128), stride=(64, 64), batched=3)),
    predict_with='both',
    views=dict(**_base_.mic.views, **_base_.cluda_views),
    objectives=dict(**_base_.mic.objectives, cluda=dict(
        _base_.cluda, size=16, weighter=dict(channels=8, embed_dims=8))))
model['views']['masked']['block'] = 8
model['views']['mixed_strong']['start'] = 1
'''


def start(folder, config, name, **changes):
    for kind in (MessageHub, MMLogger, Visualizer, SegLocalVisualizer):
        kind._instance_dict.clear()
    cfg = Config.fromfile(config)
    streams = 'train_dataloader.dataset.streams'
    cfg.merge_from_dict({
        f'{streams}.source.dataset.num_images': 4,
        f'{streams}.target.dataset.num_images': 4,
        'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'val_dataloader.dataset.num_images': 1,
        'model.pseudo_labels.target.threshold': 0.11,
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 1, 'log_processor.window_size': 1,
        'randomness': dict(seed=3), 'work_dir': str(folder / name),
        'experiment_name': f'{folder.name}_{name}', **changes})
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'own.py'
    path.write_text(CONFIG.format(root=str(ROOT)))
    return path


def logged(runner):
    return {key: list(value.data[0]) for key, value in
            runner.message_hub.log_scalars.items() if 'loss' in key}


def test_a_run_and_its_second_half(tmp_path, config):
    whole = start(tmp_path, config, 'whole')
    losses = logged(whole)
    for view in ('source', 'mixed', 'masked'):
        for part in ('', 'hr.'):
            assert len(losses[f'train/{view}.decode.{part}loss_ce']) == 4
    for view in ('source', 'mixed_strong'):
        assert min(losses[f'train/cluda.loss_{view}']) > 0
    assert len(whole.message_hub.get_scalar('val/mIoU').data[0]) == 2
    assert list((tmp_path / 'whole').rglob('iter_*.png'))  # panels
    state = whole.model.state_dict()
    assert any('cluda.weighter' in key for key in state)

    half = start(tmp_path, config, 'half', **{
        'resume': True, 'load_from': str(tmp_path / 'whole' / 'iter_2.pth')})
    for key, values in logged(half).items():
        assert values[-2:] == losses[key][-2:], key
    again = half.model.state_dict()
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
