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
from mmengine.structures import PixelData
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS

from helpers import narrower, sample
from mmseg_contrast.adaptation import FeatureDistance, UDASegmentor
from mmseg_contrast.models import ContrastHead

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / 'configs').rglob('*.py')
                 if '_base_' not in path.parts)
NAMES = [str(path.relative_to(ROOT / 'configs')) for path in SHIPPED]
#: Methods of contrast, each with a folder of its own.
CONTRAST = ['cluda', 'contrastive_seg', 'label_efficient', 'local_contrast',
            'mochi', 'pipa', 'proca', 'protoseg', 'rekd', 'sdca', 'sepico',
            'spcl']
PAIRS = ['camvid2idd', 'camvid_day2dusk', 'nuclei_fluo2he',
         'vessel_drive2chase']


def test_configs_are_found():
    assert {name.split('/')[0] for name in NAMES} >= {
        'quickstart', 'dacs', 'benchmarks', 'daformer', 'hrda', 'mic',
        'source_only', *CONTRAST}
    # Four benchmarks by four methods, five smaller encoders, four parts
    # left out, three other decoders.
    large = [name for name in NAMES if '512x512' in name
             and name.split('/')[0] not in CONTRAST]
    assert len(large) == 4 * 4 + 5 + 4 + 3
    # HRDA and MIC on HRDA, CLUDA on HRDA.
    assert sum('1024x1024' in name for name in NAMES) == 4 * 3


def every(value):
    """All dicts within a config."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from every(one)


def smaller(cfg):
    """The same network with fewer blocks: what is tested is the config."""
    for part in every(cfg.model):
        kind = part.get('type')
        if kind == 'ReferenceMixVisionTransformer':
            part['num_layers'] = (1, 1, 1, 1)
        elif kind == 'ResNetV1c':
            part['depth'] = 50
        elif kind == 'SyncBN':  # works on GPUs alone
            part['type'] = 'BN'
        elif kind == 'BalancedCrop':
            part['size'] = (64, 64)
        elif kind == 'HRDASegmentor':
            part['detail_size'] = (32, 32)
        elif kind == 'ContrastHead':
            part['start'] = 0
        elif kind == 'UnsureDetail':
            part['start'] = 0
        elif kind == 'HardEasy':
            part['max_views'] = 1
        elif kind == 'MemoryBank':
            part.update(pixels=50, segments=50)
        elif kind == 'SegmentQueue':
            part['length'] = 10
        elif kind == 'Contrast':  # a net not yet trained has nothing right
            part['correct_only'] = ()
    return cfg


def batch_for(cfg, num_classes, side=64):
    """Images, and samples with labels in blocks of 16 pixels, by stream."""
    gen = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=gen)
    labels = torch.randint(
        0, num_classes, (2, side // 16, side // 16), generator=gen)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
    inputs, samples = {}, {}
    for name, options in cfg.train_dataloader.dataset.streams.items():
        inputs[name] = images if options.labelled else images.flip(0)
        samples[name] = [
            sample(one if options.labelled else None, (side, side))
            for one in labels]
        if options.get('pseudo_labels'):
            for data, one in zip(samples[name], labels, strict=True):
                data.pseudo_label = PixelData(data=one.unsqueeze(0))
    return inputs, samples


def check_losses(losses, at_least):
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert sum('loss' in key for key in losses) >= at_least


def check_contrast(model, step, names):
    """Something is contrasted, and the student learns from it."""
    student = getattr(model, 'segmentor', model)
    heads = [part for part in student.modules()
             if isinstance(part, ContrastHead)]
    if not heads:
        return
    if any(head.update == 'after' for head in heads):
        step()  # the bank was empty
    losses = step()
    found = [value for key, value in losses.items()
             if 'loss' in key and key.startswith(names)]
    total = sum(found)
    assert len(found) >= len(heads) and total > 0
    weight = next(one for one in student.backbone.parameters()
                  if one.requires_grad)
    grad, = torch.autograd.grad(total, weight)
    assert torch.isfinite(grad).all() and grad.any()


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_a_shipped_config_builds_and_takes_a_step(path):
    cfg = smaller(Config.fromfile(path))
    if any(part.get('type') in ('ReferenceMixVisionTransformer', 'ResNetV1c')
           for part in every(cfg.model)):
        narrower(cfg.model)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for hook in cfg.custom_hooks:
        build_from_cfg(hook, HOOKS)
    evaluators = cfg.get('val_evaluator') or []
    for metric in evaluators if isinstance(evaluators, list) else [
            evaluators]:
        METRICS.build(metric)
    if 'server_evaluator' in cfg:
        METRICS.build(cfg.server_evaluator)
        assert DATASETS.get(cfg.server_dataloader.dataset.type)
    if 'segmentor' not in cfg.model:
        return check_supervised(cfg, model)
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
    assert model.num_classes == cfg.pair.num_classes
    batch = batch_for(cfg, model.num_classes)
    model.train()
    check_losses(model(*batch, mode='loss'), len(model.objectives))
    check_contrast(model, lambda: model(*batch, mode='loss'), 'contrast')


def check_supervised(cfg, model):
    """A stock loader and a stock segmentor."""
    assert DATASETS.get(cfg.train_dataloader.dataset.type)
    streams = dict(source=dict(labelled=True))
    fake = Config(dict(train_dataloader=dict(dataset=dict(streams=streams))))
    inputs, samples = batch_for(fake, model.num_classes)
    model.train()
    check_losses(model.loss(inputs['source'], samples['source']), 1)
    check_contrast(
        model, lambda: model.loss(inputs['source'], samples['source']),
        'aux_1.loss_contrast')


#: Data that have been loaded: many configs share theirs.
LOADED = set()


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_the_data_of_a_shipped_config_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = Config.fromfile(path)
    if 'streams' not in cfg.train_dataloader.dataset:
        pytest.skip('a stock loader of mmseg')
    roots = {options.dataset.get('data_root', '.') for options in
             cfg.train_dataloader.dataset.streams.values()}
    missing = [root for root in roots if not Path(root).is_dir()]
    if missing:
        pytest.skip(f'{missing[0]} is not there')
    if any('pseudo_labels' in options for options in
           cfg.train_dataloader.dataset.streams.values()):
        pytest.skip('a stage before it makes its pseudo-labels')
    same = repr((cfg.train_dataloader.dataset, cfg.get('test_dataloader')))
    if same in LOADED:
        return  # by another config
    LOADED.add(same)
    streams = DATASETS.build(cfg.train_dataloader.dataset)
    item = streams[0]
    assert set(item['inputs']) == set(cfg.train_dataloader.dataset.streams)
    for name, data in item['data_samples'].items():
        assert ('gt_sem_seg' in data) is (name == 'source')
    assert len(streams.metainfo['classes']) == cfg.pair.num_classes
    if not cfg.get('test_dataloader'):
        return
    test = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(test) > 0 and 'gt_sem_seg' in test[0]['data_samples']
    assert tuple(test.metainfo['classes']) == tuple(
        streams.metainfo['classes'])


def lines_of(path):
    return [line for line in path.read_text().splitlines() if line.strip()]


@pytest.mark.parametrize('path', SHIPPED, ids=NAMES)
def test_a_shipped_config_is_short(path):
    lines = lines_of(path)
    if path.parent.name in CONTRAST:
        # With what is the method's own among the bases.
        own = [ROOT / 'configs' / one for line in lines for one in re.findall(
            r"'(?:\.\./)+(_base_/contrast/\S+\.py)'", line)]
        assert len(own) <= 1
        assert len(lines) + sum(len(lines_of(one)) for one in own) <= 60
    else:
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


def test_the_examples_of_hrda_mic_and_cluda(tmp_path):
    """As they are printed, around the shipped configs."""
    text = (ROOT / 'docs' / 'hrda_mic_cluda.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    folder = ROOT / 'configs'
    hrda, mic, momentum, cluda, published = (
        block.replace("'configs/", f"'{folder}/") for block in blocks)
    plain = folder / 'daformer' / f'daformer_{MAIN}'

    def built(name, text, base):
        text = re.sub(r"'my_\w+_config.py'", f"'{base}'", text)
        path = tmp_path / name
        path.write_text(text)
        return path, MODELS.build(smaller(Config.fromfile(path)).model)

    large, model = built('hrda.py', hrda, plain)
    assert type(model.segmentor).__name__ == 'HRDASegmentor'
    assert type(model.decode_head.head).__name__ == 'DAFormerHead'
    for base in (plain, large):
        path, model = built('mic.py', mic, base)
        assert list(model.objectives)[-1] == 'masked'
        _, model = built(
            'momentum.py', f"_base_ = ['{path}']\n{momentum}", base)
        assert model.views['target_labelled'].pseudo_label == 'sure'
        assert set(model.teachers) == {'ema', 'slow'}
        _, model = built('cluda.py', cluda, base)
        assert (model.objectives['cluda'].weighter is None) == (base == plain)
    _, model = built('published.py', published, large)
    assert type(model.views['mixed_strong']).__name__ == 'UnsureDetail'
    assert model.objectives['cluda'].weighter['head'].channels == 256


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


HRDA = {
    'gta2cityscapes': ((2560, 1440), (2048, 1024)),
    'synthia2cityscapes': ((2560, 1520), (2048, 1024)),
    'cityscapes2acdc': ((2048, 1024), (1920, 1080)),
    'cityscapes2darkzurich': ((2048, 1024), (1920, 1080))}


def hrda_config(pair, method='hrda'):
    folder = method.split('_')[0]
    return Config.fromfile(
        ROOT / 'configs' / folder /
        f'{method}_mit-b5_1xb2-40k_{pair}-1024x1024.py')


def steps(pipeline, kind):
    return [step for step in pipeline if step.type == kind]


@pytest.mark.parametrize('pair', HRDA)
def test_data_of_hrda(pair):
    cfg = hrda_config(pair)
    streams = cfg.train_dataloader.dataset.streams
    for stream, size, ratio in zip(
            streams.values(), HRDA[pair], (0.75, None), strict=True):
        resize, = steps(stream.dataset.pipeline, 'Resize')
        assert (resize.scale, resize.keep_ratio) == (size, True)
        crop, = steps(stream.dataset.pipeline, 'RandomCrop')
        assert crop.crop_size == (1024, 1024)
        assert crop.get('cat_max_ratio') == ratio
    for loader in (cfg.test_dataloader, cfg.server_dataloader):
        resize, = steps(loader.dataset.pipeline, 'Resize')
        assert (resize.scale, resize.keep_ratio) == (HRDA[pair][1], True)
    flips, sizes = (cfg.tta_pipeline[1].transforms[i] for i in (1, 0))
    assert [one.scale for one in sizes][1] == HRDA[pair][1]
    assert len(sizes) == 3 and len(flips) == 2
    # Four times the pixels of DAFormer's crops: 6000 instead of 1500.
    assert streams.source.rare_class == dict(
        temperature=0.01, min_pixels=3000, min_crop_ratio=2.0)
    margins = steps(streams.target.dataset.pipeline, 'MarkValidRegion')
    assert margins == ([dict(
        type='MarkValidRegion', top=30, bottom=240, left=30, right=30)]
        if pair.endswith('2cityscapes') else [])
    if margins:
        assert streams.target.dataset.pipeline[1] == margins[0]
    assert cfg.train_dataloader.batch_size == 2


@pytest.mark.parametrize('pair', HRDA)
def test_constants_of_hrda(pair):
    """DAFormer's method and schedule with another student and other data."""
    cfg = hrda_config(pair)
    student = cfg.model.segmentor
    assert student.type == 'HRDASegmentor'
    assert student.data_preprocessor.size == (1024, 1024)
    assert cfg.data_preprocessor.size == (1024, 1024)
    assert student.test_cfg.mode == 'slide'
    assert student.test_cfg.crop_size == (1024, 1024)
    assert student.test_cfg.stride == (512, 512)
    assert student.test_cfg.batched == 6
    daformer = Config.fromfile(
        DAFORMER / f'daformer_{MAIN}'.replace('gta2cityscapes', pair))
    assert student.decode_head.head == daformer.model.segmentor.decode_head
    assert student.backbone == daformer.model.segmentor.backbone
    for part in ('teachers', 'pseudo_labels', 'views', 'objectives'):
        assert cfg.model[part] == daformer.model[part]
    for part in ('optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert cfg[part] == daformer[part]


def test_the_network_of_hrda():
    model = MODELS.build(smaller(hrda_config('gta2cityscapes')).model
                         .segmentor)
    cfg = hrda_config('gta2cityscapes').model.segmentor
    assert (cfg.detail_size, cfg.factor, cfg.divisor) == ((512, 512), 2, 8)
    assert model.overlap and not model.include_last
    model.detail_size = cfg.detail_size
    assert len(model.windows(1024, 1024)) == 9
    boxes = [model.draw_box(1024, 1024) for _ in range(2000)]
    assert {box[0] for box in boxes} == set(range(0, 512, 8))
    head = model.decode_head
    assert (head.detail_weight, head.context_weight) == (0.1, 0.)
    # The attention: SegFormer's decoder with 256 channels, for each class.
    attention = head.scale_attention
    assert (attention.channels, attention.num_classes) == (256, 19)
    assert type(attention.fuse_layer).__name__ == 'ConvFusion'
    assert head.head.channels == 256


@pytest.mark.parametrize('pair', HRDA)
@pytest.mark.parametrize('under', ['daformer', 'hrda'])
def test_constants_of_cluda(under, pair):
    """One more objective; on HRDA, where the detail of mixed images is."""
    name = f'daformer_{MAIN}'.replace('gta2cityscapes', pair)
    plain, cfg = (
        (hrda_config(pair), hrda_config(pair, 'cluda_hrda'))
        if under == 'hrda' else
        (Config.fromfile(DAFORMER / name),
         Config.fromfile(ROOT / 'configs' / 'cluda' / f'cluda_{name}')))
    weighter = dict(weighter=dict()) if under == 'hrda' else {}
    objective = cfg.model.objectives.pop('cluda')
    assert objective == cfg.pop('cluda') == dict(
        type='ResolutionContrast', views=('source', 'mixed_strong'), size=65,
        tau=1.0, weight=1.0, **weighter)
    model = MODELS.build(smaller(Config.fromfile(cfg.filename)).model)
    if under == 'hrda':
        cfg.pop('cluda_views')
        views, old = cfg.model.views, plain.model.views
        assert views.pop('mixed_strong') == dict(
            type='UnsureDetail', view='mixed_augmented', start=12001)
        # What it was, by another name.
        assert views.pop('mixed_augmented') == old.pop('mixed_strong')
        # SegFormer's decoder with 256 channels and one logit, at the rate
        # of heads.
        head = model.objectives['cluda'].weighter['head']
        assert (head.channels, head.out_channels) == (256, 1)
        assert [one.proj.in_features for one in
                head.embed_layers.values()] == [64, 128, 320, 512]
        assert type(head.fuse_layer).__name__ == 'ConvFusion'
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.head == dict(
            lr_mult=10.0)
    else:
        assert model.objectives['cluda'].weighter is None
    assert flat(cfg.to_dict()) == flat(plain.to_dict())


@pytest.mark.parametrize('pair', HRDA)
@pytest.mark.parametrize(('under', 'block'), [('daformer', 32),
                                              ('hrda', 64)])
def test_constants_of_mic(under, block, pair):
    if under == 'hrda':
        plain, cfg = hrda_config(pair), hrda_config(pair, 'mic_hrda')
    else:
        name = f'daformer_{MAIN}'.replace('gta2cityscapes', pair)
        plain = Config.fromfile(DAFORMER / name)
        cfg = Config.fromfile(ROOT / 'configs' / 'mic' / f'mic_{name}')
    model = cfg.model
    other = flat(plain.to_dict())
    new = {key for key, value in flat(cfg.to_dict()).items()
           if other.get(key, '-') != value}
    assert all(key.startswith(('mic.', 'model.views.', 'model.objectives.'))
               for key in new)
    assert set(other) <= set(flat(cfg.to_dict()))
    views = [name for name in model.views if name not in plain.model.views]
    if pair.endswith('2cityscapes'):
        assert views == ['target_labelled', 'target_strong', 'masked']
        assert model.views.target_strong == dict(
            type='StrongAugment', view='target_labelled',
            jitter_strength=0.2, share_order=True)
    else:
        assert views == ['target_labelled', 'halves', 'masked']
        assert model.views.halves == dict(
            type='Halves', first='source', second='target_labelled')
    assert model.views.masked == dict(
        type='BlockMask', view=views[1], block=block, ratio=0.7)
    assert model.views.target_labelled == dict(
        type='PseudoLabelled', view='target', pseudo_label='target')
    # A weight of 1 and the same teacher, threshold and weights.
    assert list(model.objectives) == [
        'source', 'feature_distance', 'mixed', 'masked']
    assert model.objectives.masked == dict(type='Segmentation', view='masked')
    assert model.pseudo_labels == plain.model.pseudo_labels
    assert model.teachers == plain.model.teachers


#: Published constants of the contrast heads: temperature, its base, weight,
#: first iteration, length of an embedding, and those of the bank.
HEADS = {
    'spcl/spcl_deeplab*': (
        100, None, 1, 0, 2048,
        dict(type='PrototypeBank', clock='ema', new_weight=0.9)),
    'sdca/sdca_deeplab*': (
        100, None, 1, 0, 2048, dict(type='GaussianBank', clock='cumulative')),
    'proca/proca_*': (
        50, None, 1, 0, 2048,
        dict(type='PrototypeBank', clock='cumulative', normalize=True)),
    'sepico/sepico-proto_*gta*': (
        100, None, 1, 3000, 512,
        dict(type='PrototypeBank', clock='cumulative')),
    'sepico/sepico-dist_daformer*gta*': (
        100, None, 1, 3000, 512,
        dict(type='GaussianBank', clock='cumulative')),
    'sepico/sepico-dist_deeplab*': (
        100, None, 1, 3000, 512,
        dict(type='GaussianBank', clock='cumulative')),
    'sepico/sepico-bank_*gta*': (
        100, None, 1, 3000, 512,
        dict(type='SegmentQueue', length=200, segment='batch',
             normalize=False, energy='mean')),
    'contrastive_seg/contrastive-seg_*': (
        0.1, 0.07, 0.1, 5000, 256, dict(type='BatchBank')),
    'contrastive_seg/contrastive-seg-memory_*': (
        0.07, 0.07, 1, 5000, 256,
        dict(type='MemoryBank', pixels=5000, segments=5000, number=10)),
    'mochi/*': (
        0.07, 0.07, 1, 5000, 256,
        dict(type='MemoryBank', pixels=5000, segments=5000, number=10)),
    'pipa/*': (0.1, 0.07, 0.1, 0, 256, dict(type='BatchBank')),
    'protoseg/*': (
        0.1, None, 0.01, 0, 256,
        dict(type='PrototypeBank', prototypes=10, new_weight=0.001,
             assign='transport', compare='prototype', iterations=3,
             epsilon=0.05, distance_weight=0.1)),
    'label_efficient/*-within_*': (
        0.07, None, 1, 0, 256, dict(type='BatchBank', scope='image')),
    'label_efficient/*-cross_*': (
        0.07, None, 1, 0, 256,
        dict(type='BatchBank', scope='positives_across_images')),
    'local_contrast/local-contrast_*': (
        0.07, None, 1, 0, 64, dict(type='BatchBank', skip_classes=[0])),
    'local_contrast/local-contrast-blocked_*': (
        0.07, None, 1, 0, 64,
        dict(type='BatchBank', skip_classes=[0], scope='block',
             block_size=32)),
    'rekd/*': (
        0.1, None, 0.1, 0, 256, dict(type='BatchBank', rule='teacher_topk'))}


def contrast_parts(pattern):
    """The contrast heads of the one config of that name."""
    path, = (ROOT / 'configs').glob(f'{pattern}.py')
    cfg = Config.fromfile(path)
    found = [part for part in every(cfg.model)
             if part.get('type') == 'ContrastHead']
    assert found
    return cfg, found


@pytest.mark.parametrize('pattern', HEADS)
def test_published_constants_of_contrast(pattern):
    tau, base_tau, weight, start, channels, bank = HEADS[pattern]
    _, heads = contrast_parts(pattern)
    levels = [head.get('features') for head in heads]
    assert levels == ([None, 'logits'] if pattern[:5] in (
        'sdca/', 'proca') else levels[:1])
    for head in heads:
        assert head.tau == tau
        assert head.get('base_tau') == base_tau
        assert head.get('loss_weight') == weight
        assert head.get('start', 0) == start
        assert head.channels == (
            19 if head.get('features') == 'logits' else channels)
        stated = head.bank.to_dict()
        stated.update({key: list(value) for key, value in stated.items()
                       if isinstance(value, tuple)})
        assert {key: stated.get(key) for key in bank} == bank


def test_which_pixels_are_contrasted():
    _, (head, ) = contrast_parts('contrastive_seg/contrastive-seg_*')
    assert head.sampler == dict(
        type='HardEasy', max_samples=1024, max_views=100)
    _, (head, ) = contrast_parts('contrastive_seg/contrastive-seg-memory_*')
    assert head.sampler.max_views == 1
    cfg, (head, ) = contrast_parts('pipa/*')
    assert head.sampler == dict(
        type='HardEasy', max_samples=1024, max_views=100)
    assert tuple(cfg.model.objectives.contrast.anchors) == ('source', )
    cfg, (head, ) = contrast_parts('spcl/spcl_deeplab*')
    assert cfg.model.pseudo_labels.target.type == 'StoredPseudoLabels'
    assert tuple(cfg.model.objectives.contrast.correct_only) == ('source', )
    for method in ('sdca/sdca_deeplab*', 'proca/proca_*'):
        cfg, _ = contrast_parts(method)
        assert cfg.model.pseudo_labels.target == dict(
            type='ConfidentPixels', teacher='student', threshold=0.9)
        losses = cfg.model.segmentor.decode_head.loss_decode
        assert [one.loss_weight for one in losses] == [1.0, 0.75]
    assert tuple(cfg.model.objectives.contrast.bank) == ('target', 'source')
    _, (head, ) = contrast_parts('mochi/*')
    assert head.mixing == dict(
        type='HardNegativeMixing', hardest=32, mixes=16, query_mixes=16,
        max_query_share=0.5)
    cfg, (head, ) = contrast_parts('rekd/*')
    assert head.reduce_positives == 'lse' and head.own == 'positive'


@pytest.mark.parametrize(('pattern', 'hidden'), [
    ('sepico/sepico-dist_daformer*gta*', 256),
    ('sepico/sepico-bank_*', 256), ('sepico/sepico-dist_deeplab*', None)])
def test_sepicos_views_and_projection(pattern, hidden):
    cfg, (head, ) = contrast_parts(pattern)
    assert head.projection.get('hidden_channels') == hidden
    assert head.projection.last_act and head.projection.layers == 2
    assert (head.label_rule, head.min_ratio) == ('ratio', 0.75)
    assert not head.get('regularizer')
    model = cfg.model
    assert model.teachers.ema.alpha == 0.999
    crop = model.views.target_crop
    assert (crop.type, crop.size, crop.max_ratio) == (
        'BalancedCrop', (640, 640), 0.75)
    contrast = model.objectives.contrast
    assert tuple(contrast.anchors) == ('source_strong', 'target_strong')
    assert (tuple(contrast.bank), contrast.bank_from) == (
        ('source', ), 'teacher')
    streams = cfg.train_dataloader.dataset.streams
    sizes = {name: [step.get('scale') or step.get('crop_size')
                    for step in one.dataset.pipeline
                    if step.type in ('Resize', 'RandomCrop')]
             for name, one in streams.items()}
    assert sizes == dict(source=[(1280, 720), (640, 640)],
                         target=[(1280, 640)])
    margins = streams.target.dataset.pipeline[1]
    assert margins == dict(
        type='MarkValidRegion', top=15 / 640, bottom=120 / 640)
    assert streams.source.rare_class.temperature == 0.01
    assert cfg.model.segmentor.data_preprocessor.size == (640, 640)
    assert cfg.data_preprocessor.size == (640, 640)
    assert cfg.optim_wrapper.optimizer.lr == 6e-5


SEPICO = 'mit-b5_1xb2-40k_gta2cityscapes-640x640.py'


def test_variants_of_sepico_change_one_thing():
    folder = ROOT / 'configs' / 'sepico'
    main = flat(Config.fromfile(
        folder / f'sepico-dist_daformer_{SEPICO}').to_dict())
    for variant, settings in (
            ('tau01', {'tau': 0.1}),
            ('128d', {'channels': 128, 'projection.hidden_channels': 128})):
        other = flat(Config.fromfile(
            folder / f'sepico-dist-{variant}_daformer_{SEPICO}').to_dict())
        head = 'model.segmentor.auxiliary_head.'
        assert {key: value for key, value in other.items()
                if main.get(key, '-') != value} == {
                    head + key: value for key, value in settings.items()}
        assert set(main) == set(other)



@pytest.mark.parametrize('method', ['spcl', 'sdca'])
def test_three_stages_follow_each_other(method):
    folder = ROOT / 'configs' / method
    stages = [next(folder.glob(f'{name}_*.py')) for name in (
        f'{method}-stage1', method, f'{method}-stage3')]
    cfgs = [Config.fromfile(path) for path in stages]
    assert [tuple(cfg.train_dataloader.dataset.streams) for cfg in cfgs] == [
        ('source', ), ('source', 'target'), ('target', )]
    ends = {'spcl': (40000, 40000, 20000), 'sdca': (20000, 40000, 20000)}
    assert tuple(cfg.train_cfg.max_iters for cfg in cfgs) == ends[method]
    for cfg in cfgs:
        short = cfg.train_cfg.max_iters == 20000
        assert cfg.optim_wrapper.optimizer.lr == (5e-4 if short else 2.5e-4)
        assert cfg.param_scheduler[0].end == (31250 if short else 62500)
    for cfg, before, last in zip(
            cfgs[1:], stages, ends[method], strict=False):
        assert cfg.load_from == f'work_dirs/{before.stem}/iter_{last}.pth'
    norms = [cfg.model.segmentor.backbone.norm_cfg.requires_grad
             for cfg in cfgs]
    assert norms == [False, False, True]


def test_load_from_names_a_stage_that_is_shipped():
    stages = {path.stem: path for path in SHIPPED}
    named = [path for path in SHIPPED if 'load_from' in path.read_text()]
    assert len(named) == 7
    for path in named:
        folder, file = Path(Config.fromfile(path).load_from).parts[-2:]
        assert folder in stages, path
        last = Config.fromfile(stages[folder]).train_cfg.max_iters
        assert file == f'iter_{last}.pth', path


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('method', [
    'spcl', 'sdca', 'sepico-proto', 'sepico-dist', 'sepico-bank',
    'contrastive-seg-memory'])
def test_benchmarks_of_contrast_are_dacs_and_a_head(pair, method):
    folder = ROOT / 'configs' / 'benchmarks' / pair
    dacs = flat(Config.fromfile(folder / 'dacs.py').to_dict())
    other = flat(Config.fromfile(folder / f'{method}.py').to_dict())
    new = {key for key in other if dacs.get(key, '-') != other[key]}
    assert set(dacs) <= set(other)
    assert all(key.startswith((
        'contrast', 'model.segmentor.auxiliary_head',
        'model.objectives.contrast')) for key in new), new


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize(('method', 'parts'), [
    ('mic', ('mic.', 'model.views.', 'model.objectives.masked')),
    ('hrda', ('model.segmentor.type', 'model.segmentor.detail_size',
              'model.segmentor.decode_head'))])
def test_benchmarks_of_hrda_and_mic_are_dacs_and_more(pair, method, parts):
    folder = ROOT / 'configs' / 'benchmarks' / pair
    dacs = Config.fromfile(folder / 'dacs.py')
    other = Config.fromfile(folder / f'{method}.py')
    old, new = flat(dacs.to_dict()), flat(other.to_dict())
    changes = {key for key in old | new
               if old.get(key, '-') != new.get(key, '-')}
    assert changes and all(key.startswith(parts) for key in changes)
    model = other.model
    if method == 'hrda':
        head = model.segmentor.decode_head
        assert head.head == dacs.model.segmentor.decode_head
        assert head.attention == dict(channels=64, embed_dims=64)
        assert model.segmentor.detail_size == (128, 128)
    else:
        for name, view in dacs.model.views.items():
            assert model.views[name] == view
        # A sixteenth of the crop's side, as 32 of 512 and 64 of 1024.
        assert (model.views.masked.block, model.views.masked.ratio) == (
            16, 0.7)
        assert model.views.target_strong.jitter_strength == (
            dacs.model.views.mixed_strong.jitter_strength)
