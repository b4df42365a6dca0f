"""Shipped configs as tiny nets: every part of a method, a step in a second."""

import copy
from pathlib import Path

import torch
from mmengine.config import Config
from mmseg.registry import MODELS

from mmseg_contrast.adaptation import FeatureDistance

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
LARGE = 'gta2cityscapes-1024x1024'
METHODS = {
    'dacs': 'dacs/dacs_deeplabv2_r101-d8_1xb2-250k_gta2cityscapes-512x512',
    'daformer': 'daformer/daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512',
    'mic-hrda': f'mic/mic_hrda_mit-b5_1xb2-40k_{LARGE}',
    'cluda': f'cluda/cluda_hrda_mit-b5_1xb2-40k_{LARGE}',
    **{f'sepico-{bank}': f'sepico/sepico-{bank}_daformer_mit-b5_1xb2-40k_'
       'gta2cityscapes-640x640' for bank in ('dist', 'bank', 'proto')},
    'pipa': 'pipa/pipa_mit-b5_1xb2-40k_gta2cityscapes-512x512'}
#: Widths of MiT-B5's stages, and those here; the same of ResNet's last one.
WIDTHS = {64: 4, 128: 8, 320: 20, 512: 32, 2048: 64}


def every(value):
    """All dicts within a config."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from every(one)


def narrow(widths):
    """A width, or several, of the tiny net."""
    if isinstance(widths, (list, tuple)):
        return [narrow(one) for one in widths]
    return WIDTHS.get(widths, widths)


def tiny_config(name, dropout=True, **backbone):
    """A method's config with a tiny net, for images of 64 x 64."""
    cfg = Config.fromfile(CONFIGS / f'{METHODS[name]}.py')
    for part in every(cfg.model):
        kind = part.get('type')
        if 'in_channels' in part:
            part['in_channels'] = narrow(part['in_channels'])
        if kind == 'ReferenceMixVisionTransformer':
            part.update(embed_dims=4, num_layers=(1, 1, 1, 1))
            if not dropout:
                part['drop_path_rate'] = 0.
            part.update(backbone)
        elif kind == 'ResNetV1c':
            part.update(depth=18, base_channels=8, stem_channels=8)
        elif kind == 'SegDataPreProcessor':
            part['size'] = (64, 64)
        elif kind in ('DAFormerHead', 'SegformerHead'):
            part.update(channels=16)
        elif kind == 'HRDASegmentor':
            part['detail_size'] = (32, 32)
        elif kind == 'HRDAHead':
            part['attention'] = dict(channels=8, embed_dims=8)
        elif kind == 'BalancedCrop':
            part['size'] = (64, 64)
        elif kind == 'BlockMask':
            part['block'] = 8
        elif kind == 'ContrastHead':
            part.update(channels=16, start=0)
            part['projection'].pop('hidden_channels', None)
        elif kind == 'HardEasy':
            part['max_views'] = 2
        elif kind == 'MemoryBank':
            part.update(pixels=50, segments=50)
        elif kind in ('SegmentQueue', 'PixelQueue'):
            part['length'] = 10
        elif kind == 'ConfidentFraction':  # a net not yet trained
            part['threshold'] = 0.06
        if 'embed_dims' in part and kind == 'DAFormerHead':
            part['embed_dims'] = 16
        if not dropout and 'dropout_ratio' in part:
            part['dropout_ratio'] = 0.
    cfg.model.segmentor.pop('pretrained', None)
    return cfg


def tiny_model(name, dropout=True, seed=0, model=None, **backbone):
    """The config and its model, in training mode."""
    cfg = tiny_config(name, dropout, **backbone)
    cfg.model.update(model or {})
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    for objective in model.objectives.values():
        if isinstance(objective, FeatureDistance):
            # The download is not tried.
            objective.freeze(copy.deepcopy(model.backbone))
    return cfg, model.train()
