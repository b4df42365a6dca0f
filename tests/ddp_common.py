"""Two ranks, or one process with both their batches; see test_ddp.py."""

import copy

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper

import ddp_methods  # noqa: F401  its backbone
from helpers import CLASSES, batch, build, dacs_parts, tiny_student
from mmseg_contrast.adaptation import BlockMask, ClassMix, StrongAugment
from mmseg_contrast.engine import UDADistributedDataParallel
from mmseg_contrast.models import HRDASegmentor
from mmseg_contrast.ops import choose_classes

SAMPLES = 2
STEPS = 3
HEAD = dict(type='ContrastHead', in_channels=8, num_classes=CLASSES,
            channels=6, in_index=1, tau=0.5)
#: Heads whose banks all ranks fill; anchors are all pixels, so that each rank
#: has as many, and the mean of two means is the mean of all.
BANKS = dict(
    prototypes=dict(type='PrototypeBank', clock='cumulative'),
    gaussian=dict(type='GaussianBank', clock='cumulative'),
    moving=dict(type='PrototypeBank', clock='ema', new_weight=0.3))
MODES = ('sum', 'sequential')
#: DACS, with each bank, and with the parts of DAFormer, MIC and HRDA. What
#: compares the pixels of a batch with each other (CLUDA, PiPa) has other keys
#: on two ranks.
METHODS = ('dacs', *BANKS, 'daformer', 'mic', 'hrda', 'mic-hrda')
CASES = [(method, mode) for method in METHODS for mode in MODES]
BOX = (8, 24, 16, 32)


def student(method):
    """Norms that see one image at a time."""
    net = tiny_student(norm_cfg=dict(type='GN', num_groups=1))
    net['backbone'] = dict(
        type='Stages', channels=(8, 8), strides=(2, 2), dropout=0.)
    if method in BANKS:
        net['auxiliary_head'] = dict(
            HEAD, bank=BANKS[method],
            projection=dict(layers=1, norm_cfg=None))
    if method.endswith('hrda'):
        net.update(
            type='HRDASegmentor', detail_size=(16, 16),
            decode_head=dict(
                type='HRDAHead', head=net['decode_head'],
                attention=dict(channels=4, embed_dims=4)))
    return net


def make(method, mode):
    parts = dacs_parts()
    if method in BANKS:
        parts['objectives']['contrast'] = dict(
            type='Contrast', anchors=['source', 'mixed_strong'],
            bank=['source'], bank_from='teacher')
    if method == 'daformer':
        parts['objectives']['feature_distance'] = dict(
            type='FeatureDistance', classes=(0, 2), weight=1.)
    if method.startswith('mic'):
        parts['views'].update(
            labelled=dict(type='PseudoLabelled'),
            masked=dict(type='BlockMask', view='labelled', block=8))
        parts['objectives']['masked'] = dict(
            type='Segmentation', view='masked')
    model = build(student(method), backward=mode, **parts).double()
    if method == 'daformer':
        frozen = copy.deepcopy(model.backbone)
        with torch.no_grad():  # not the student's own features
            for one in frozen.parameters():
                one.mul_(1.5)
        model.objectives['feature_distance'].freeze(frozen)
    return model


def inject(first):
    """Draws by the place of an image among those of all ranks."""

    def scores(*shape):
        gen = torch.Generator().manual_seed(5)
        full = torch.rand(2 * SAMPLES, *shape, generator=gen)
        return full[first:]

    ClassMix.choose = lambda self, present, generator: choose_classes(
        present, scores(present.shape[1])[:len(present)])
    StrongAugment.draw = lambda self, samples, generator: dict(
        jitter=True, blur=True, order=scores(4).argsort(1)[:samples],
        factors=(scores(4)[:samples] * 0.4 + torch.tensor(
            [.8, .8, .8, -.2])).double(),
        sigma=scores()[:samples].double() + 0.2)
    BlockMask.draw = lambda self, samples, height, width, generator: scores(
        height // self.block, width // self.block)[:samples]
    HRDASegmentor.draw_box = lambda self, height, width, generator: BOX


def data(step, first, count):
    """Each rank has as many labelled pixels, and as many of each class."""
    both = batch(samples=2 * SAMPLES, seed=step)
    samples = both['data_samples']['source']
    for i, one in enumerate(samples):
        labels = one.gt_sem_seg.data
        labels[labels == 255] = 1
        if i >= SAMPLES:
            labels.copy_(samples[i - SAMPLES].gt_sem_seg.data.flip(2))
    return dict(
        inputs={name: [image.double() for image in
                       images[first:first + count]]
                for name, images in both['inputs'].items()},
        data_samples={name: some[first:first + count]
                      for name, some in both['data_samples'].items()})


def train(method, mode, first=0, count=2 * SAMPLES):
    """Weights, teacher and bank after some steps, and the gradients."""
    model = make(method, mode)
    inject(first)
    wrapped = model
    if dist.is_initialized():
        wrapped = (MMDistributedDataParallel if mode == 'sum'
                   else UDADistributedDataParallel)(module=model)
    optim_wrapper = OptimWrapper(
        torch.optim.SGD(model.segmentor.parameters(), 0.1, momentum=0.9),
        accumulative_counts=2, clip_grad=dict(max_norm=0.5))
    optim_wrapper.initialize_count_status(model, 0, STEPS)
    for step in range(STEPS):
        wrapped.train_step(data(step, first, count), optim_wrapper)
    return model.state_dict()


def train_all(folder):
    """On a rank: each case, with this rank's batch."""
    rank = dist.get_rank()
    states = {f'{method}.{mode}': train(
        method, mode, SAMPLES * rank, SAMPLES) for method, mode in CASES}
    torch.save(states, folder / f'rank{rank}.pth')
