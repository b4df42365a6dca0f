"""Small models and batches for tests."""

import copy

import mmengine.config.config
import torch
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn
from yapf.yapflib import yapf_api

CLASSES = 5
NORM = dict(type='BN')


@MODELS.register_module(force=True)
class TinyBackbone(nn.Module):
    """Two strided convolutions with batch norm and dropout."""

    def __init__(self, channels=8, dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1),
                          nn.BatchNorm2d(channels), nn.ReLU()),
            nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1),
                          nn.BatchNorm2d(channels), nn.ReLU(),
                          nn.Dropout(dropout))])

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def tiny_student(num_classes=CLASSES, dropout=0.0, size=(32, 32), **head):
    """Config of a complete small EncoderDecoder."""
    decode = dict(
        type='FCNHead', in_channels=8, in_index=1, channels=8, num_convs=1,
        concat_input=False, num_classes=num_classes, norm_cfg=NORM,
        dropout_ratio=dropout, loss_decode=dict(type='CrossEntropyLoss'))
    decode.update(head)
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375], bgr_to_rgb=True, size=size),
        backbone=dict(type='TinyBackbone', dropout=dropout),
        decode_head=decode, train_cfg=dict(), test_cfg=dict(mode='whole'))


def unformatted_configs():
    """mmengine lays out each config that it logs or saves: a second each."""
    for module in (yapf_api, mmengine.config.config):
        module.FormatCode = lambda text, **_: (text, True)


#: Keys of configs that say how wide a net is.
WIDTHS = ('base_channels', 'channels', 'embed_dim', 'embed_dims',
          'feat_channels', 'feedforward_channels', 'in_channels',
          'out_channels', 'pam_channels')


def narrower(part):
    """Divide the widths within a net's config by four, in place.

    Small ones stay: the colours of an image, the classes of logits.
    """
    if str(part.get('type', '')).startswith('ResNet'):
        part.setdefault('base_channels', 64)
    for key, value in part.items():
        many = isinstance(value, (list, tuple))
        if key in WIDTHS:
            numbers = [one // 4 if one > 16 and one % 16 == 0 else one
                       for one in (value if many else [value])]
            part[key] = numbers if many else numbers[0]
        for one in value if many else [value]:
            if isinstance(one, dict):
                narrower(one)


def dacs_parts(**changes):
    """The parts of DACS; a keyword replaces one named part's options."""
    parts = dict(
        teachers=dict(ema=dict(type='EMATeacher', alpha=0.99)),
        pseudo_labels=dict(target=dict(type='ConfidentFraction',
                                       threshold=0.3)),
        views=dict(mixed=dict(type='ClassMix'),
                   mixed_strong=dict(type='StrongAugment', view='mixed')),
        objectives=dict(
            source=dict(type='Segmentation', view='source'),
            mixed=dict(type='Segmentation', view='mixed_strong')))
    parts = copy.deepcopy(parts)
    for key, value in changes.items():
        parts[key] = value
    return parts


def build(segmentor=None, seed=0, **parts):
    """A UDASegmentor with reproducible weights, in training mode."""
    torch.manual_seed(seed)
    parts = parts or dacs_parts()
    model = MODELS.build(dict(
        type='UDASegmentor',
        segmentor=tiny_student() if segmentor is None else segmentor,
        **parts))
    return model.train()


def sample(labels=None, size=(32, 32)):
    """A SegDataSample, labelled or not."""
    data = SegDataSample(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size,
        img_path='none.png'))
    if labels is not None:
        data.gt_sem_seg = PixelData(data=labels.unsqueeze(0))
    return data


def batch(size=(32, 32), samples=2, num_classes=CLASSES, seed=0):
    """A batch of a source and a target stream, as the loader gives it."""
    gen = torch.Generator().manual_seed(seed)

    def image():
        return torch.randint(0, 256, (3, *size), generator=gen,
                             dtype=torch.uint8)

    def labels():
        blocks = torch.randint(0, num_classes, (size[0] // 8, size[1] // 8),
                               generator=gen)
        full = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
        full[:2] = 255
        return full

    return dict(
        inputs=dict(source=[image() for _ in range(samples)],
                    target=[image() for _ in range(samples)]),
        data_samples=dict(
            source=[sample(labels(), size) for _ in range(samples)],
            target=[sample(None, size) for _ in range(samples)]))


def double(data):
    """The same batch with images in float64."""
    return dict(data, inputs={
        name: [image.double() for image in images]
        for name, images in data['inputs'].items()})


def run(model, data):
    """Losses of one iteration."""
    data = model.data_preprocessor(copy.deepcopy(data), True)
    return model(**data, mode='loss')


def total(losses):
    """What mmengine would minimise."""
    return sum(v for k, v in losses.items() if 'loss' in k)


class ScaledWrapper(OptimWrapper):
    """AmpOptimWrapper as it is, which asks for a GPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.)

    def backward(self, loss, **options):
        self.loss_scaler.scale(loss).backward(**options)
        self._inner_count += 1

    def step(self, **options):
        self.loss_scaler.step(self.optimizer, **options)
        self.loss_scaler.update()
