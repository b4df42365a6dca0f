"""Two ranks train each method in turn; see test_ddp.py.

Each config gets a small backbone of its own widths. What is written: for each
config the keys that differ between the ranks, and what was drawn.
"""

import copy
import json

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from torch import nn

from helpers import sample
from methods import every
from mmseg_contrast.adaptation import FeatureDistance
from mmseg_contrast.models import ContrastHead

SIDE = 64
#: Widths of the four outputs.
WIDTHS = dict(ReferenceMixVisionTransformer=(64, 128, 320, 512),
              ResNetV1c=(256, 512, 1024, 2048))
#: MiT-B0 and B1 are told apart by their first width.
FIRST = {32: (32, 64, 160, 256), 64: (64, 128, 320, 512)}
#: Without valid pixels on rank 1.
EMPTY = (3, 4)


@MODELS.register_module(force=True)
class Stages(nn.Module):
    """Four strided convolutions; norms don't see the batch."""

    def __init__(self, channels, strides, dropout=0.1, pretrained=None):
        super().__init__()
        self.layers = nn.ModuleList()
        before = 3
        for width, stride in zip(channels, strides, strict=True):
            self.layers.append(nn.Sequential(
                nn.Conv2d(before, width, stride, stride),
                nn.GroupNorm(1, width), nn.ReLU(), nn.Dropout(dropout)))
            before = width

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def narrow(number):
    return number if number < 32 else max(number // 16, 4)


def shrink(cfg):
    """The same method with a net of a few thousand weights."""
    # MobileNetV2 is small already.
    wide = any(part.get('type') in WIDTHS for part in every(cfg.model))
    for part in every(cfg.model):
        kind = part.get('type')
        if kind in WIDTHS:
            widths = (FIRST[part.embed_dims] if kind != 'ResNetV1c'
                      else WIDTHS[kind])
            strides = ((4, 2, 2, 2) if kind != 'ResNetV1c'
                       else (4, 2, 1, 1))
            part.clear()
            part.update(type='Stages', strides=strides,
                        channels=[narrow(width) for width in widths])
            continue
        if kind == 'MobileNetV2':
            part.init_cfg = None
        for key in ('channels', 'in_channels', 'embed_dims'):
            value = part.get(key)
            if wide and isinstance(value, int):
                part[key] = narrow(value)
            elif wide and isinstance(value, (list, tuple)):
                part[key] = [narrow(one) for one in value]
        if kind == 'SegDataPreProcessor':
            part.size = (SIDE, SIDE)
        elif kind == 'SyncBN':  # works on GPUs alone
            part['type'] = 'BN'
        elif kind == 'BalancedCrop':
            part['size'] = (SIDE, SIDE)
        elif kind == 'HRDASegmentor':
            part['detail_size'] = (32, 32)
        elif kind == 'ContrastHead':
            part['start'] = 0
        elif kind == 'HardEasy':
            part['max_views'] = 1
        elif kind == 'MemoryBank':
            part.update(pixels=50, segments=50)
        elif kind == 'SegmentQueue':
            part['length'] = 10
    return cfg


def make_batch(cfg, num_classes, seed, empty):
    """What the loader gives, of one image for each stream."""
    gen = torch.Generator().manual_seed(seed)

    def stream(labelled, stored):
        images, samples = [], []
        for _ in range(2):
            images.append(torch.randint(
                0, 256, (3, SIDE, SIDE), generator=gen, dtype=torch.uint8))
            labels = torch.randint(0, num_classes, (4, 4), generator=gen)
            labels = labels.repeat_interleave(16, 0).repeat_interleave(16, 1)
            if empty:
                labels = torch.full_like(labels, 255)
            one = sample(labels if labelled else None, (SIDE, SIDE))
            if stored:
                one.pseudo_label = PixelData(data=labels.unsqueeze(0))
            if not labelled and empty:
                one.valid_region = PixelData(
                    data=torch.zeros(1, SIDE, SIDE, dtype=torch.uint8))
            samples.append(one)
        return images, samples

    dataset = cfg.train_dataloader.dataset
    if 'streams' not in dataset:
        images, samples = stream(True, False)
        return dict(inputs=images, data_samples=samples)
    made = {name: stream(options.labelled, options.get('pseudo_labels'))
            for name, options in dataset.streams.items()}
    return dict(inputs={k: images for k, (images, _) in made.items()},
                data_samples={k: samples for k, (_, samples) in made.items()})


def differing(model):
    """Keys of the state whose values are not those of rank 0."""
    found = []
    for key, value in model.state_dict().items():
        if 'running_' in key or 'num_batches' in key:
            continue  # NormSyncHook is for these
        first = value.clone()
        dist.broadcast(first, 0)
        same = torch.tensor(float(torch.equal(first, value)))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        if not same:
            found.append(key)
    return found


def gathered(value):
    every_rank = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(every_rank, value)
    return every_rank


def prepare(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for objective in getattr(model, 'objectives', {}).values():
        if isinstance(objective, FeatureDistance):
            objective.freeze(copy.deepcopy(model.backbone))
    return model.train()


def train(path, steps):
    cfg = shrink(Config.fromfile(path))
    model = prepare(cfg)
    wrapped = MMDistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=False)
    # Without momentum a wrong gradient is a wrong weight at once.
    optim_wrapper = OptimWrapper(torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.01),
        clip_grad=dict(max_norm=1.))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rank = dist.get_rank()
    finite, logged = True, {}
    if hasattr(model, 'keep_step'):
        model.keep_step = True
    num_classes = cfg.pair.num_classes if 'pair' in cfg else 19
    for i in range(steps):
        logged = wrapped.train_step(make_batch(
            cfg, num_classes, 2 * i + rank, rank == 1 and i in EMPTY),
            optim_wrapper)
        finite &= all(v.isfinite().all().item() for v in logged.values())
    after = model.state_dict()
    drawn = [step.views['mixed'].extras['origin'].float()
             for step in [getattr(model, 'last_step', None)]
             if step is not None and 'mixed' in step.views]
    student = getattr(model, 'segmentor', model)
    heads = [m for m in student.modules() if isinstance(m, ContrastHead)]
    return dict(
        finite=finite, differing=differing(model),
        moved=sum(not torch.equal(before[k], v) for k, v in after.items()
                  if 'running_' not in k and not k.startswith('teachers')),
        banks=[key for key, value in after.items()
               if 'bank.' in key and not torch.equal(before[key], value)],
        heads=len(heads),
        same_draws=[torch.equal(*gathered(one)) for one in drawn])


def train_each(folder, steps, paths):
    """On a rank: each config in turn."""
    found = {}
    for path in paths:
        hub = MessageHub.get_instance(path)
        hub.update_info('max_iters', 100)
        hub.update_info('seed', 0)
        found[path] = train(path, steps)
    if dist.get_rank() == 0:
        (folder / 'found.json').write_text(json.dumps(found))
