"""Every shipped config is built; the README's example too."""

import ast
import copy
import re
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import build_from_cfg
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS

from helpers import sample
from mmseg_contrast.adaptation import FeatureDistance, UDASegmentor

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / 'configs').rglob('*.py')
                 if '_base_' not in path.parts)
NAMES = [str(path.relative_to(ROOT / 'configs')) for path in SHIPPED]


def test_configs_are_found():
    assert {name.split('/')[0] for name in NAMES} >= {
        'quickstart', 'dacs', 'benchmarks', 'daformer', 'source_only'}
    # Four benchmarks by three methods, five smaller encoders, four parts
    # left out, three other decoders.
    large = [name for name in NAMES if '512x512' in name]
    assert len(large) == 4 * 3 + 5 + 4 + 3


def smaller(cfg):
    """The same network with fewer blocks: what is tested is the config."""
    backbone = cfg.model.segmentor.backbone
    if backbone.type == 'ReferenceMixVisionTransformer':
        backbone.num_layers = (1, 1, 1, 1)
    elif backbone.type == 'ResNetV1c':
        backbone.depth = 50
    return cfg


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_a_shipped_config_builds_and_takes_a_step(path):
    cfg = smaller(Config.fromfile(path))
    model = MODELS.build(cfg.model)
    assert isinstance(model, UDASegmentor)
    for objective in model.objectives.values():
        if isinstance(objective, FeatureDistance):
            # The download is not tried.
            objective.freeze(copy.deepcopy(model.backbone))
    streams = cfg.train_dataloader.dataset.streams
    for name, options in streams.items():
        assert DATASETS.get(options.dataset.type), name
        kinds = [step.type for step in options.dataset.pipeline]
        loads = any('Annotations' in k or 'Labels' in k for k in kinds)
        assert loads is options.labelled
    assert cfg.train_dataloader.sampler.type == 'PositionSampler'
    for hook in cfg.custom_hooks:
        build_from_cfg(hook, HOOKS)
    evaluators = cfg.val_evaluator
    for metric in evaluators if isinstance(evaluators, list) else [
            evaluators]:
        METRICS.build(metric)
    if 'server_evaluator' in cfg:
        METRICS.build(cfg.server_evaluator)
        assert DATASETS.get(cfg.server_dataloader.dataset.type)
    assert model.num_classes == cfg.pair.num_classes
    side = 64
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, model.num_classes, (2, side, side),
                           generator=gen)
    images = torch.randn(2, 3, side, side, generator=gen)
    batch = dict(
        source=(images, [sample(one, (side, side)) for one in labels]),
        target=(images.flip(0), [sample(None, (side, side))] * 2))
    losses = model.train()(
        {name: batch[name][0] for name in streams},
        {name: batch[name][1] for name in streams}, mode='loss')
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert sum('loss' in key for key in losses) >= len(streams)


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_the_data_of_a_shipped_config_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = Config.fromfile(path)
    roots = {options.dataset.get('data_root', '.') for options in
             cfg.train_dataloader.dataset.streams.values()}
    missing = [root for root in roots if not Path(root).is_dir()]
    if missing:
        pytest.skip(f'{missing[0]} is not there')
    streams = DATASETS.build(cfg.train_dataloader.dataset)
    item = streams[0]
    assert set(item['inputs']) == {'source', 'target'}
    assert 'gt_sem_seg' in item['data_samples']['source']
    assert 'gt_sem_seg' not in item['data_samples']['target']
    assert len(streams.metainfo['classes']) == cfg.pair.num_classes
    test = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(test) > 0 and 'gt_sem_seg' in test[0]['data_samples']
    assert tuple(test.metainfo['classes']) == tuple(
        streams.metainfo['classes'])


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_a_shipped_config_is_short(path):
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= (25 if '512x512' in path.name else 35)


def test_the_example_of_the_readme_wraps_a_stock_config(tmp_path):
    readme = (ROOT / 'README.md').read_text()
    example = next(block for block in re.findall(
        r'```python\n(.*?)```', readme, re.S) if '_base_' in block)
    ast.parse(example)
    assert len([line for line in example.splitlines() if line]) <= 25
    stock = (Path(mmseg.__file__).parent / '.mim' / 'configs' / 'segformer' /
             'segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')
    example = example.replace('configs/', f'{ROOT}/configs/')
    example = example.replace('my_stock_mmseg_config.py', str(stock))
    path = tmp_path / 'my_uda_config.py'
    path.write_text(example)
    cfg = Config.fromfile(path)
    model = MODELS.build(cfg.model)
    assert type(model.backbone).__name__ == 'MixVisionTransformer'
    assert cfg.train_dataloader.dataset.type == 'StreamDataset'
    assert cfg.optim_wrapper.constructor == 'UDAOptimWrapperConstructor'
