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


DAFORMER = ROOT / 'configs' / 'daformer'
MAIN = 'mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
#: Channels and depths of MiT, Xie et al., 2021, table 6.
ENCODERS = {
    'b0': ([32, 64, 160, 256], (2, 2, 2, 2)),
    'b1': ([64, 128, 320, 512], (2, 2, 2, 2)),
    'b2': ([64, 128, 320, 512], (3, 4, 6, 3)),
    'b3': ([64, 128, 320, 512], (3, 4, 18, 3)),
    'b4': ([64, 128, 320, 512], (3, 8, 27, 3)),
    'b5': ([64, 128, 320, 512], (3, 6, 40, 3))}


def flat(value, path=''):
    """Leaves of a config by their path."""
    if isinstance(value, dict):
        return {key: leaf for name, one in value.items()
                for key, leaf in flat(one, f'{path}.{name}').items()}
    return {path.lstrip('.'): value}


def changed(name):
    """Which settings differ from the main DAFormer config."""
    main = flat(Config.fromfile(DAFORMER / f'daformer_{MAIN}').to_dict())
    other = flat(Config.fromfile(DAFORMER / name).to_dict())
    return {key for key in main | other
            if main.get(key, '-') != other.get(key, '-')}


@pytest.mark.parametrize('size', ENCODERS)
def test_encoders(size):
    name = f'daformer_{MAIN}'.replace('b5', size)
    cfg = Config.fromfile(DAFORMER / name)
    channels, depths = ENCODERS[size]
    backbone = cfg.model.segmentor.backbone
    assert tuple(backbone.num_layers) == depths
    assert [backbone.embed_dims * heads for heads in
            backbone.num_heads] == channels
    assert cfg.model.segmentor.decode_head.in_channels == channels
    assert f'mit_{size}_' in backbone.init_cfg.checkpoint
    within = 'model.segmentor.'
    assert {key for key in changed(name) if key != 'pretrained'} <= {
        f'{within}backbone.embed_dims', f'{within}backbone.num_layers',
        f'{within}backbone.init_cfg.checkpoint',
        f'{within}decode_head.in_channels'}


@pytest.mark.parametrize(('left_out', 'settings'), [
    ('no-rcs', {f'train_dataloader.dataset.streams.source.rare_class{key}'
                for key in ('', '.temperature', '.min_pixels',
                            '.min_crop_ratio')}),
    ('no-fd', {f'model.objectives.feature_distance.{key}' for key in
               ('type', 'view', 'weight', 'classes', 'min_ratio')}),
    ('no-warmup', {'param_scheduler'}),
    ('alpha99', {'model.teachers.ema.alpha'})])
def test_ablations_change_one_thing(left_out, settings):
    assert changed(f'daformer-{left_out}_{MAIN}') == settings


def test_daformers_constants():
    cfg = Config.fromfile(DAFORMER / f'daformer_{MAIN}')
    model = cfg.model
    assert model.teachers.ema.alpha == 0.999
    assert model.pseudo_labels.target.threshold == 0.968
    assert model.objectives.feature_distance.weight == 0.005
    assert tuple(model.objectives.feature_distance.classes) == (
        6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
    streams = cfg.train_dataloader.dataset.streams
    assert streams.source.rare_class == dict(
        temperature=0.01, min_pixels=3000, min_crop_ratio=0.5)
    # 15 and 120 of 512 rows, behind the loading transform.
    margins = streams.target.dataset.pipeline[1]
    assert margins == dict(type='MarkValidRegion', top=30, bottom=240)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_iters == 40000
    crops = [step for stream in streams.values() for step in
             stream.dataset.pipeline if step.type == 'RandomCrop']
    assert [crop.crop_size for crop in crops] == [(512, 512)] * 2
    assert [crop.get('cat_max_ratio') for crop in crops] == [0.75, None]


def test_constants_of_network_and_schedule():
    cfg = Config.fromfile(DAFORMER / f'daformer_{MAIN}')
    student = cfg.model.segmentor
    assert student.backbone.drop_path_rate == 0.1
    assert student.decode_head.dropout_ratio == 0.1
    assert student.decode_head.align_corners is False
    assert tuple(student.decode_head.fusion.dilations) == (1, 6, 12, 18)
    assert cfg.model.views.mixed_strong.jitter_strength == 0.2
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, tuple(optimizer.betas),
            optimizer.weight_decay) == ('AdamW', 6e-5, (0.9, 0.999), 0.01)
    for stream in cfg.train_dataloader.dataset.streams.values():
        flips = [step.prob for step in stream.dataset.pipeline
                 if step.type == 'RandomFlip']
        assert flips == [0.5]


def test_constants_of_dacs():
    cfg = Config.fromfile(next((ROOT / 'configs/dacs').glob('*gta2*.py')))
    model = cfg.model
    assert model.teachers.ema.alpha == 0.99
    assert model.pseudo_labels.target.threshold == 0.968
    assert model.views.mixed.class_scope == 'sample'
    assert model.views.mixed_strong.jitter_strength == 0.25
    assert tuple(model.segmentor.decode_head.dilations) == (6, 12)
    assert model.segmentor.decode_head.align_corners is True
    assert cfg.optim_wrapper.optimizer == dict(
        type='SGD', lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
    assert cfg.param_scheduler == [dict(
        type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=250000,
        by_epoch=False)]
    assert cfg.train_cfg.max_iters == 250000


@pytest.mark.parametrize(('pair', 'sizes'), [
    ('gta2cityscapes', ((1280, 720), (1024, 512))),
    ('synthia2cityscapes', ((1280, 760), (1024, 512))),
    ('cityscapes2acdc', ((1024, 512), (960, 540))),
    ('cityscapes2darkzurich', ((1024, 512), (960, 540)))])
def test_published_image_sizes(pair, sizes):
    name = f'daformer_{MAIN}'.replace('gta2cityscapes', pair)
    cfg = Config.fromfile(DAFORMER / name)
    streams = cfg.train_dataloader.dataset.streams
    resizes = [step for stream in streams.values() for step in
               stream.dataset.pipeline if step.type == 'Resize']
    # mmseg 0.16 kept the aspect ratio where nothing was said.
    assert [(step.scale, step.keep_ratio) for step in resizes] == [
        (size, True) for size in sizes]
    tested = [step for step in cfg.test_dataloader.dataset.pipeline
              if step.type == 'Resize']
    assert [(step.scale, step.keep_ratio) for step in tested] == [
        (sizes[1], True)]
