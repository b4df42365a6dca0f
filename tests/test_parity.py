"""Traps of the published code that no other test holds: docs/parity.md."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS, TRANSFORMS
from torch import nn

import mmseg_contrast
from helpers import batch, build, run, tiny_student
from mmseg_contrast import ops

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
BASE = CONFIGS / '_base_'


def daformer(pair, variant='daformer'):
    return Config.fromfile(
        CONFIGS / 'daformer' / f'{variant}_mit-b5_1xb2-40k_{pair}-512x512.py')


def transformed(steps, height, width):
    """What some transforms of a config make of an image of that size."""
    results = dict(
        img=np.zeros((height, width, 3), np.uint8),
        img_shape=(height, width),
        gt_seg_map=np.zeros((height, width), np.uint8),
        seg_fields=['gt_seg_map'])
    for step in steps:
        results = TRANSFORMS.build(step).transform(results)
    return results


def test_parity_options_have_the_published_values():
    """What is an option here has the behaviour of the published code."""
    for name, scope, alpha in (('daformer', 'batch', 0.999),
                               ('dacs', 'sample', 0.99)):
        uda = Config.fromfile(BASE / 'uda' / f'{name}.py').uda
        model = build(**uda.to_dict() | dict(objectives=dict(
            mixed=uda.objectives.mixed.to_dict())))
        assert model.views['mixed'].class_scope == scope
        assert model.views['mixed'].mix_ignore is True
        assert model.pseudo_labels['target'].scope == 'batch'
        assert model.pseudo_labels['target'].threshold == 0.968
        assert model.teachers['ema'].alpha == alpha
        assert model.teachers['ema'].batch_norm == 'batch'
        assert model.predict_with == 'student'


def test_parity_pseudo_labels_survive_the_mix():
    """The published code wrote the mixed weights over the plain ones."""
    model = build()
    model.keep_step = True
    run(model, batch())
    step = model.last_step
    pseudo, mixed = step.pseudo_label('target'), step.view('mixed_strong')
    q = pseudo.parts[0][0]
    assert 0 < q < 1
    assert (pseudo.weights == q).all()
    confidence, labels = step.teacher('ema', 'target').max(1)
    assert torch.equal(pseudo.labels, labels)
    assert torch.equal(pseudo.confidence, confidence)
    origin = mixed.extras['origin']
    assert origin.any() and (mixed.weights[origin] == 1).all()
    assert (mixed.weights[~origin] == q).all()


def test_parity_teachers_see_the_whole_crop():
    """mmseg's slide_inference writes into the metas that it gets."""
    sliding = dict(mode='slide', crop_size=(16, 16), stride=(16, 16))
    model = build(tiny_student() | dict(test_cfg=sliding))
    data = model.data_preprocessor(batch(), True)
    samples = data['data_samples']['target']
    before = [dict(one.metainfo) for one in samples]
    model.keep_step = True
    model.loss(**data)
    assert [dict(one.metainfo) for one in samples] == before

    model.teachers['ema'].model.test_cfg.mode = 'whole'
    model.teachers['ema'].model.slide_inference = None
    again = model.teachers['ema'].predict(model.last_step.view('target'))
    assert torch.equal(again, model.last_step.teacher('ema', 'target'))


def test_parity_no_rate_rises_without_the_warmup():
    """Published, the backbone's rose from 6e-5 to 1e-4 in this ablation."""
    cfg = daformer('gta2cityscapes', 'daformer-no-warmup')
    optimizer = torch.optim.SGD([
        dict(params=[nn.Parameter(torch.zeros(1))], lr=lr)
        for lr in (6e-5, 6e-4)])
    schedulers = [PARAM_SCHEDULERS.build(dict(one, optimizer=optimizer))
                  for one in cfg.param_scheduler]
    rates = []
    for _ in range(cfg.train_cfg.max_iters):
        rates.append([group['lr'] for group in optimizer.param_groups])
        for scheduler in schedulers:
            scheduler.step()
    rates = np.array(rates)
    assert rates[0] == pytest.approx([6e-5, 6e-4])
    assert (np.diff(rates, axis=0) < 0).all()
    assert rates[20000] == pytest.approx([3e-5, 3e-4], rel=1e-4)
    assert rates[-1, 0] < 1e-8


def test_parity_fusion_leaves_the_context_alone():
    """A loss on the context's logits must get those without attention."""
    gen = torch.Generator().manual_seed(0)
    context, attention = torch.rand(2, 1, 3, 4, 4, generator=gen)
    detail = torch.rand(1, 3, 4, 4, generator=gen)
    before = context.clone(), attention.clone()
    fused = ops.fuse_detail(context, detail, attention, (0, 4, 4, 8))
    assert fused.shape == (1, 3, 8, 8)
    assert torch.equal(context, before[0])
    assert torch.equal(attention, before[1])


def test_parity_no_module_overrides_call():
    """Hooks, compiled modules and wrappers only see ``forward``."""
    seen = 0
    for info in pkgutil.walk_packages(mmseg_contrast.__path__,
                                      'mmseg_contrast.'):
        module = importlib.import_module(info.name)
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if (issubclass(kind, nn.Module)
                    and kind.__module__.startswith('mmseg_contrast')):
                assert '__call__' not in vars(kind), name
                seen += 1
    assert seen > 10


@pytest.mark.parametrize(('pair', 'stream', 'loaded', 'resized'), [
    ('gta2cityscapes', 'source', (1052, 1914), (704, 1280)),
    ('gta2cityscapes', 'target', (1024, 2048), (512, 1024)),
    ('synthia2cityscapes', 'source', (760, 1280), (760, 1280)),
    ('cityscapes2acdc', 'source', (1024, 2048), (512, 1024)),
    ('cityscapes2acdc', 'target', (1080, 1920), (540, 960)),
    ('cityscapes2darkzurich', 'target', (1080, 1920), (540, 960))])
def test_parity_images_keep_their_aspect_ratio(pair, stream, loaded,
                                               resized):
    streams = daformer(pair).train_dataloader.dataset.streams
    steps = [step for step in streams[stream].dataset.pipeline
             if step.type == 'Resize']
    results = transformed(steps, *loaded)
    assert results['img'].shape[:2] == resized
    assert results['gt_seg_map'].shape == resized


@pytest.mark.parametrize(('pair', 'loaded', 'rows'), [
    ('gta2cityscapes', (1024, 2048), 512),
    ('synthia2cityscapes', (1024, 2048), 512),
    ('cityscapes2acdc', (1080, 1920), 540),
    ('cityscapes2darkzurich', (1080, 1920), 540)])
def test_parity_margins_belong_to_the_image(pair, loaded, rows):
    """15 and 120 rows of the resized image, wherever the crop lies."""
    streams = daformer(pair).train_dataloader.dataset.streams
    steps = [step for step in streams.target.dataset.pipeline
             if step.type in ('MarkValidRegion', 'Resize')]
    region = transformed(steps, *loaded)['valid_region']
    assert region.shape[0] == rows
    assert not region[:15].any() and not region[-120:].any()
    assert region[15:-120].all()


def test_parity_cross_entropy_has_an_eps_in_its_denominator():
    """mmseg's own, 1e-11 of the loss in the golden run: left as it is."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 4, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 4, 4), generator=gen)
    labels[:, 0] = 255
    found = CrossEntropyLoss()(logits, labels, ignore_index=255)
    total = nn.functional.cross_entropy(
        logits, labels, ignore_index=255, reduction='sum')
    eps = torch.finfo(torch.float32).eps
    assert float(found * (32 + eps) / total - 1) == pytest.approx(
        0, abs=1e-13)
    assert float(found * 32 / total - 1) < -3e-9


def test_parity_deeplabv2_has_two_dilations():
    """The published line returns from inside of the loop over four."""
    model = Config.fromfile(BASE / 'models' / 'deeplabv2_r101-d8.py').model
    head = MODELS.build(model.decode_head)
    assert [layer.conv.dilation for layer in head.aspp_modules] == [
        (6, 6), (12, 12)]
