"""Four steps of the published DAFormer code, number by number.

tests/data/README.md says where the numbers come from. The published draws
are injected; everything else is this package's own.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.structures import PixelData
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_contrast.engine.optimizer import UDAOptimWrapperConstructor
from mmseg_contrast.models.legacy import convert_student

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / 'configs' / '_base_'
CLASSES = 6
#: Prefix of the run: precision, and where in the schedule it begins.
RUNS = {'': (torch.float32, 0), 'late/': (torch.float32, 1498),
        'f64/': (torch.float64, 0), 'f64_late/': (torch.float64, 1498)}
LOSSES = {
    'source.decode.loss_ce': 'log/decode.loss_seg',
    'feature_distance.loss_feature_distance':
        'log/src.loss_imnet_feat_dist',
    'mixed.decode.loss_ce': 'log/mix.decode.loss_seg'}


@pytest.fixture(scope='module')
def golden():
    with np.load(HERE / 'data' / 'dacs_4iter.npz') as file:
        return {name: file[name] for name in file.files}


def published_student(golden):
    """The published state, by the published names."""
    state, start = {}, 0
    for name, shape in zip(golden['student_names'], golden['student_shapes'],
                           strict=True):
        shape = tuple(int(side) for side in str(shape).split('x') if side)
        size = int(np.prod(shape, dtype=int))
        values = golden['student_values'][start:start + size]
        state[str(name)] = torch.from_numpy(values.copy()).reshape(shape)
        start += size
    assert start == len(golden['student_values'])
    return state


class StoredFeatures(nn.Module):
    """Stands for the frozen backbone: its features of each batch."""

    def __init__(self, features, dtype):
        super().__init__()
        self.features = torch.from_numpy(features).to(dtype)
        self.iteration = 0

    def forward(self, images):
        return [self.features[self.iteration]]


def build_model(golden, dtype):
    """The tiny net of the recording, with DAFormer's own base config."""
    uda = Config.fromfile(CONFIGS / 'uda' / 'daformer.py').uda
    uda.pseudo_labels.target.threshold = 0.39
    uda.objectives.feature_distance.classes = (2, 4)
    model = MODELS.build(dict(
        type='UDASegmentor',
        segmentor=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor', mean=golden['mean'].tolist(),
                std=golden['std'].tolist(), bgr_to_rgb=True, size=(64, 64)),
            backbone=dict(
                type='ReferenceMixVisionTransformer', embed_dims=8,
                num_layers=(1, 1, 1, 1), drop_path_rate=0.0),
            decode_head=dict(
                type='DAFormerHead', in_channels=[8, 16, 40, 64],
                channels=16, embed_dims=16, num_classes=CLASSES,
                dropout_ratio=0.0),
            train_cfg=dict(), test_cfg=dict(mode='whole')),
        **uda))
    converted = convert_student(published_student(golden))
    model.segmentor.load_state_dict(converted.weights)
    model.objectives['feature_distance'].freeze(
        StoredFeatures(golden['imnet_features'], dtype))
    model.keep_step = True
    return model.to(dtype).train(), converted.sources


def build_optimizer(model, first):
    """Optimizer and schedulers of the shipped schedule, after some steps."""
    cfg = Config.fromfile(CONFIGS / 'schedules' / 'adamw_40k_warmup.py')
    wrapper_cfg = copy.deepcopy(cfg.optim_wrapper)
    paramwise = wrapper_cfg.pop('paramwise_cfg')
    assert OPTIM_WRAPPER_CONSTRUCTORS.get(
        wrapper_cfg.pop('constructor')) is UDAOptimWrapperConstructor
    wrapper = UDAOptimWrapperConstructor(wrapper_cfg, paramwise)(model)
    schedulers = [PARAM_SCHEDULERS.build(dict(one, optimizer=wrapper))
                  for one in copy.deepcopy(cfg.param_scheduler)]
    for _ in range(first):
        for scheduler in schedulers:
            scheduler.step()
    return wrapper, schedulers


def inject(model, golden, i):
    """Make the model draw what the published code drew."""
    chosen = torch.zeros(2, CLASSES + 1, dtype=torch.bool)
    for row, classes in zip(chosen, golden['draw/chosen_classes'][i],
                            strict=True):
        row[[min(int(c), CLASSES) for c in classes]] = True
    model.views['mixed'].choose = lambda present, generator: chosen
    factors = torch.from_numpy(np.stack(
        [golden[f'draw/jitter_{name}'][i] for name in
         ('brightness', 'contrast', 'saturation', 'hue')], 1)).double()
    # The published hue is the drawn number of turns times a float32 pi: 3e-8
    # of the shift, which only the float64 runs can see.
    factors[:, 3] *= float(np.float32(np.pi)) / np.pi
    draws = dict(
        jitter=bool(golden['draw/color_jitter_u'][i] > 0.2),
        blur=bool(golden['draw/blur_u'][i] > 0.5),
        factors=factors,
        order=torch.from_numpy(golden['draw/jitter_order'][i]),
        sigma=torch.from_numpy(golden['draw/blur_sigma'][i]))
    model.views['mixed_strong'].draw = lambda samples, generator: draws
    model.objectives['feature_distance'].encoder.iteration = i


def inputs(golden, i, dtype):
    """The batch as the preprocessor would give it."""
    mean, std = (torch.from_numpy(golden[key]).view(3, 1, 1)
                 for key in ('mean', 'std'))

    def images(name):
        raw = torch.from_numpy(golden[name][i]).float()
        return ((raw - mean) / std).to(dtype)

    region = torch.ones(1, 64, 64, dtype=torch.uint8)
    region[:, :4], region[:, -8:] = 0, 0
    source = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in
              torch.from_numpy(golden['src_label'][i]).long()]
    target = [SegDataSample(valid_region=PixelData(data=region))
              for _ in range(2)]
    return (dict(source=images('src_img'), target=images('tgt_img')),
            dict(source=source, target=target))


def named(segmentor, sources, kind='value'):
    """Our tensors (or their gradients) under the published names."""
    result = {}
    for name, parameter in segmentor.named_parameters():
        tensor = parameter.grad if kind == 'grad' else parameter.detach()
        keys = sources[name]
        if len(keys) == 1:
            result[keys[0]] = tensor
            continue
        rows = len(tensor) // 3  # queries, then keys and values
        for key in keys:
            result[key] = (tensor[:rows] if '.attn.q.' in key
                           else tensor[rows:])
    return result


def norms(tensors, names):
    return np.array([float(tensors[str(name)].double().norm())
                     for name in names])


def agree(found, wanted, relative=0.0, absolute=0.0):
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), wanted,
                               rtol=relative, atol=absolute)


@pytest.mark.parametrize('run', RUNS)
def test_golden_four_steps(golden, run):
    dtype, first = RUNS[run]
    exact = dtype is torch.float64
    torch.set_num_threads(1)
    model, sources = build_model(golden, dtype)
    wrapper, schedulers = build_optimizer(model, first)
    names = golden['param_names']
    # The keys' half of this bias has no gradient but rounding noise, which
    # AdamW turns into steps.
    settled = np.array(['attn.kv.bias' not in str(name) for name in names])
    start = published_student(golden)

    for i in range(4):
        inject(model, golden, i)
        losses = model.loss(*inputs(golden, i, dtype))
        step = model.last_step

        # Learning rates, to 7 digits.
        if not exact:
            rates = {id(p): group['lr'] for group in
                     wrapper.optimizer.param_groups for p in group['params']}
            ours = {key: rates[id(p)] for name, p in
                    model.segmentor.named_parameters()
                    for key in sources[name]}
            agree([ours[str(name)] for name in names],
                  golden[f'{run}lr'][i], 1e-7)

        # Pseudo-labels and their weight.
        pseudo = step.pseudo_label('target')
        q = float(pseudo.parts[0][0])
        if exact:
            assert q == pytest.approx(float(golden[f'{run}q'][i]), abs=1e-7)
        else:
            assert abs(q - golden[f'{run}q'][i]) <= 2.5 / 8192
        if run in ('', 'f64/'):
            labels = pseudo.labels.numpy()
            assert (labels != golden['pseudo_label'][i]).sum() <= (
                0 if exact else 2)
            agree(pseudo.weights[:, ::4, ::4],
                  golden['pseudo_weight_s4'][i], 0, 3e-4)

            # Mixed images and labels.
            mixed = step.view('mixed_strong')
            assert (mixed.labels.numpy() != golden['mixed_label'][i]).sum(
            ) <= (0 if exact else 2)
            agree(mixed.images[..., ::4, ::4], golden['mixed_img_s4'][i],
                  0, 1e-5)

        # Losses, gradients, weights.
        for mine, theirs in LOSSES.items():
            agree(losses[mine].detach(), golden[f'{run}{theirs}'][i],
                  1e-10 if exact else 2e-6, 1e-12)
        wrapper.zero_grad()
        sum(value for key, value in losses.items()
            if 'loss' in key).backward()
        if f'{run}grad_norm_after_backward' in golden:
            found = norms(named(model.segmentor, sources, 'grad'), names)
            agree(found, golden[f'{run}grad_norm_after_backward'][i, 2],
                  1e-9 if exact else 1e-4, 1e-12 if exact else 2e-7)
        if i == 3 and run.endswith('late/'):
            compare_tensors(golden, run, 'grad', sources, model, exact)
        taught = norms(named(model.teachers['ema'].model, sources), names)
        agree(taught[settled], golden[f'{run}teacher_norm'][i][settled],
              1e-11 if exact else 3e-6)
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
        weights = named(model.segmentor, sources)
        agree(norms(weights, names)[settled],
              golden[f'{run}param_norm'][i][settled],
              1e-11 if exact else 3e-6)
        if i == 3 and run.endswith('late/'):
            compare_tensors(golden, run, 'param', sources, model, exact)
            # Not the trivial agreement of weights that hardly moved.
            moved = (weights['decode_head.conv_seg.weight']
                     - start['decode_head.conv_seg.weight']).abs().max()
            assert moved > 1e-3

        # Batch norm: two updates of the student, one of the teacher.
        for who, net in (('student', model.segmentor),
                         ('teacher', model.teachers['ema'].model)):
            norm = net.decode_head.fuse_layer.bottleneck.bn
            assert int(norm.num_batches_tracked) == golden[
                f'{run}bn_{who}/num_batches_tracked'][i]
            for name in ('running_mean', 'running_var'):
                agree(getattr(norm, name), golden[f'{run}bn_{who}/{name}'][i],
                      1e-10 if exact else 2e-5, 1e-12 if exact else 5e-6)


def compare_tensors(golden, run, kind, sources, model, exact):
    """Eleven tensors in full, relative to each one's largest entry."""
    tensors = named(model.segmentor, sources, kind)
    stored, start = golden[run + kind], 0
    for name in golden['tensors']:
        found = tensors[str(name)].double().numpy().ravel()
        wanted = stored[start:start + found.size]
        start += found.size
        scale = float(np.abs(wanted).max())
        if kind == 'grad':
            agree(found, wanted, 0, scale * (1e-10 if exact else 3e-5))
        else:
            # AdamW makes as much of a small gradient as of a large one.
            agree(found, wanted, 0, 1e-12 if exact else 5e-6)
    assert start == len(stored)


def test_golden_teacher_logits(golden):
    """The teacher sees the plain target with its own batch statistics."""
    model, _ = build_model(golden, torch.float32)
    inject(model, golden, 0)
    images, samples = inputs(golden, 0, torch.float32)
    model.loss(images, samples)
    with torch.no_grad():
        logits = model.teachers['ema'].model.encode_decode(
            images['target'], [dict(ori_shape=(64, 64), img_shape=(64, 64),
                                    pad_shape=(64, 64),
                                    padding_size=(0, 0, 0, 0))] * 2)
    agree(logits[..., ::4, ::4], golden['teacher_logits_s4'][0], 0, 3e-5)


def test_golden_parameter_groups(golden):
    """Published learning rates and decays, in as few groups as there are."""
    model, sources = build_model(golden, torch.float32)
    wrapper, _ = build_optimizer(model, 0)
    groups = wrapper.optimizer.param_groups
    assert len(groups) == 3
    settings = {id(p): (group['initial_lr'], group['weight_decay'])
                for group in groups for p in group['params']}
    ours = {key: settings[id(p)] for name, p in
            model.segmentor.named_parameters() for key in sources[name]}
    found = np.array([ours[str(name)] for name in golden['param_names']])
    agree(found[:, 0], golden['param_base_lr'], 1e-12)
    agree(found[:, 1], golden['param_weight_decay'], 1e-12)


def test_golden_feature_distance_labels(golden):
    model, _ = build_model(golden, torch.float32)
    from mmseg_contrast.ops import downscale_labels
    for i in range(4):
        labels = downscale_labels(
            torch.from_numpy(golden['src_label'][i]).long(), 32, CLASSES)
        assert np.array_equal(labels.numpy(), golden['fd_label'][i])
        things = model.objectives['feature_distance'].things[labels]
        assert np.array_equal(things.numpy(), golden['fd_mask'][i] > 0)


def test_golden_needs_the_published_eps(golden):
    """mmseg's own MiT is off by more than rounding: why ours exists."""
    mine, _ = build_model(golden, torch.float64)
    images = inputs(golden, 0, torch.float64)[0]['source']
    stock = MODELS.build(dict(
        type='MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1],
        num_heads=[1, 2, 5, 8])).double()
    stock.load_state_dict(mine.segmentor.backbone.state_dict())
    with torch.no_grad():
        apart = [float((a - b).abs().max()) for a, b in zip(
            mine.segmentor.backbone(images), stock(images), strict=True)]
    agree(apart, [2.23e-4, 8.6e-5, 5.6e-5, 2.9e-5], 0.02)
