"""Three steps of the published MIC code on HRDA, number by number.

tests/data/README.md says where the numbers come from. The published draws,
the places of the details among them, are injected; everything else is this
package's own. One constant is set by hand: the published blur has 13 taps for
images of 128 pixels, ours stops at 11, which is within 1.1e-6.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from test_golden_daformer import (
    CLASSES,
    CONFIGS,
    StoredFeatures,
    agree,
    build_optimizer,
    named,
    norms,
    published_student,
)

from mmseg_contrast.models.legacy import convert_student

DATA = Path(__file__).resolve().parent / 'data'
#: In float32. The recorded code adds up attention in another order, and Adam
#: magnifies rounding where gradients are small.
LOGITS, WEIGHTS = 1e-4, 2e-6
#: Prefix of the run, its precision, and whose draws it has.
RUNS = {'': (torch.float32, ''), 'f64/': (torch.float64, ''),
        'sep/': (torch.float32, 'sep/'), 'sep_f64/': (torch.float64, 'sep/')}
VIEWS = dict(source='src', mixed_strong='mix', masked='masked')
LOSSES = {
    'source.decode.loss_ce': 'decode.loss_seg',
    'source.decode.hr.loss_ce': 'decode.hr.loss_seg',
    'feature_distance.loss_feature_distance': 'src.loss_imnet_feat_dist',
    'mixed.decode.loss_ce': 'mix.decode.loss_seg',
    'mixed.decode.hr.loss_ce': 'mix.decode.hr.loss_seg',
    'masked.decode.loss_ce': 'masked.decode.loss_seg',
    'masked.decode.hr.loss_ce': 'masked.decode.hr.loss_seg'}
JITTER = ('brightness', 'contrast', 'saturation', 'hue')
SIZE = (128, 128)


@pytest.fixture(scope='module')
def golden():
    recording = {}
    for name in ('dacs_4iter', 'mic_hrda'):
        with np.load(DATA / f'{name}.npz') as file:
            if name == 'dacs_4iter':
                recording.update({key: file[key] for key in file.files
                                  if key.startswith('student_')})
            else:
                recording.update({key: file[key] for key in file.files})
    return recording


def student_state(golden):
    """The published state, by the published names."""
    state = {}
    for name, value in published_student(golden).items():
        state[name.replace('decode_head.', 'decode_head.head.')] = value
    for name in golden:
        if name.startswith('student/'):
            state[name[8:]] = torch.from_numpy(golden[name])
    return state


def build_model(golden, dtype, mode):
    """The tiny net of the recording, with DAFormer's own base config."""
    uda = Config.fromfile(CONFIGS / 'uda' / 'daformer.py').uda
    uda.pseudo_labels.target.threshold = float(golden['pseudo_threshold'])
    uda.objectives.feature_distance.classes = (2, 4)
    uda.objectives.masked = dict(type='Segmentation', view='masked')
    labelled = dict(type='PseudoLabelled', view='target')
    if mode == 'sep/':
        uda.views.update(
            target_labelled=labelled, halves=dict(type='Halves'),
            masked=dict(type='BlockMask', view='halves', block=16))
    else:
        uda.views.update(
            target_labelled=labelled,
            target_strong=dict(type='StrongAugment', share_order=True,
                               view='target_labelled'),
            masked=dict(type='BlockMask', view='target_strong', block=16))
    stages = [8, 16, 40, 64]
    model = MODELS.build(dict(
        type='UDASegmentor',
        segmentor=dict(
            type='HRDASegmentor', detail_size=(64, 64),
            data_preprocessor=dict(
                type='SegDataPreProcessor', mean=golden['mean'].tolist(),
                std=golden['std'].tolist(), bgr_to_rgb=True, size=SIZE),
            backbone=dict(
                type='ReferenceMixVisionTransformer', embed_dims=8,
                num_layers=(1, 1, 1, 1), drop_path_rate=0.0),
            decode_head=dict(
                type='HRDAHead',
                head=dict(
                    type='DAFormerHead', in_channels=stages, channels=16,
                    embed_dims=16, num_classes=CLASSES, dropout_ratio=0.0),
                attention=dict(channels=12, embed_dims=12)),
            train_cfg=dict(), test_cfg=dict(mode='whole')),
        **uda))
    converted = convert_student(student_state(golden))
    model.segmentor.load_state_dict(converted.weights)
    model.objectives['feature_distance'].freeze(
        StoredFeatures(golden['imnet_features'], dtype))
    for view in model.views.values():
        if hasattr(view, 'max_radius'):
            view.max_radius = 6  # the published 13 taps
    model.keep_step = True
    return model.to(dtype).train(), converted.sources


def jitter_draws(golden, run, prefix, i):
    factors = torch.from_numpy(np.stack(
        [golden[f'{run}draw/{prefix}jitter_{name}'][i] for name in JITTER],
        1)).double()
    # A float32 pi, see test_golden_daformer.
    factors[:, 3] *= float(np.float32(np.pi)) / np.pi
    order = torch.from_numpy(golden[f'{run}draw/{prefix}jitter_order'][i])
    sigma = torch.as_tensor(golden[f'{run}draw/{prefix}blur_sigma'][i])
    return dict(
        jitter=bool(golden[f'{run}draw/{prefix}color_jitter_u'][i] > 0.2),
        blur=bool(golden[f'{run}draw/{prefix}blur_u'][i] > 0.5),
        factors=factors, order=order.expand(2, 4), sigma=sigma.expand(2))


def inject(model, golden, run, i):
    """Make the model draw what the published code drew."""
    chosen = torch.zeros(2, CLASSES + 1, dtype=torch.bool)
    for row, classes in zip(chosen, golden[f'{run}draw/chosen_classes'][i],
                            strict=True):
        row[[min(int(c), CLASSES) for c in classes]] = True
    model.views['mixed'].choose = lambda present, generator: chosen
    uniforms = torch.from_numpy(golden[f'{run}draw/mic_mask_u'][i])
    model.views['masked'].draw = (
        lambda samples, height, width, generator: uniforms)
    for view, prefix in (('mixed_strong', ''), ('target_strong', 'mic_')):
        if view in model.views:
            draws = jitter_draws(golden, run, prefix, i)
            model.views[view].draw = (
                lambda samples, generator, draws=draws: draws)
    # Source, mixed and masked pass; the test checks that it was so.
    boxes = iter(golden[f'{run}hr_box'][i].tolist())
    model.segmentor.draw_box = (
        lambda height, width, generator: tuple(next(boxes)))
    model.objectives['feature_distance'].encoder.iteration = i


def inputs(golden, i, dtype):
    """The batch as the preprocessor would give it."""
    mean, std = (torch.from_numpy(golden[key]).view(3, 1, 1)
                 for key in ('mean', 'std'))

    def images(name):
        raw = torch.from_numpy(golden[name][i]).float()
        return ((raw - mean) / std).to(dtype)

    source = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in
              torch.from_numpy(golden['src_label'][i]).long()]
    target = [SegDataSample(valid_region=PixelData(data=one.view(1, *SIZE)))
              for one in torch.from_numpy(golden['valid_pseudo_mask'][i])]
    return (dict(source=images('src_img'), target=images('tgt_img')),
            dict(source=source, target=target))


def record(head):
    """Keep what the head gives, and the norms of the windows' logits."""
    seen, inner = [], []
    scales = head.scales
    head.scales = lambda features: seen.append(scales(features)) or seen[-1]
    head.head.register_forward_hook(
        lambda module, args, output: inner.append(
            output.detach().double().flatten(1).norm(dim=1)))
    return seen, inner


@pytest.mark.parametrize('run', RUNS)
def test_golden_three_steps(golden, run):
    dtype, drawn = RUNS[run]
    exact = dtype is torch.float64
    torch.set_num_threads(1)
    model, sources = build_model(golden, dtype, drawn)
    wrapper, schedulers = build_optimizer(model, 1498)
    names = golden['param_names']
    settled = np.array([not without_gradient(str(name)) for name in names])
    teacher = model.teachers['ema'].model
    taught, windows = record(teacher.decode_head)
    learnt, _ = record(model.segmentor.decode_head)

    for i in range(3):
        for one in (taught, windows, learnt):
            one.clear()
        inject(model, golden, drawn, i)
        losses = model.loss(*inputs(golden, i, dtype))
        wrapper.zero_grad()
        sum(value for key, value in losses.items()
            if 'loss' in key).backward()
        step = model.last_step
        assert list(step.students) == list(VIEWS)

        compare_labels(golden, run, drawn, i, step, exact)
        compare_images(golden, drawn, i, step)
        students = dict(zip(VIEWS.values(), learnt, strict=True))
        if not drawn:
            if not exact:
                compare_rates(golden, i, wrapper, model, sources)
            compare_logits(golden, i, taught, students)
            # The first of the teacher's calls is the context's.
            agree(windows[1], golden['teacher_raw_hr_crops_norm'][i], 3e-6)
        else:
            agree(students['masked'].fused.detach()[..., ::4, ::4],
                  golden['sep/masked_fused_s4'][i], 0, LOGITS)
        if run == 'f64/' and i == 0:
            agree(taught[0].fused[..., ::4, ::4],
                  golden['f64/teacher_fused_s4'], 0, 1e-11)
            agree(students['masked'].fused.detach()[..., ::4, ::4],
                  golden['f64/masked_fused_s4'], 0, 1e-11)

        for mine, theirs in LOSSES.items():
            agree(losses[mine].detach(), golden[f'{run}log/{theirs}'][i],
                  1e-10 if exact else 2e-6, 1e-12)
        if run != 'sep/' or i < 2:
            agree(norms(named(model.segmentor, sources, 'grad'),
                        names)[settled],
                  golden[f'{run}grad_norm'][i][settled],
                  1e-9 if exact else 1e-4, 1e-12 if exact else 2e-7)
        if i == 2 and exact:
            compare_tensors(golden, run, 'grad', model, sources)
        if f'{run}teacher_norm' in golden:
            agree(norms(named(teacher, sources), names)[settled],
                  golden[f'{run}teacher_norm'][i][settled],
                  1e-11 if exact else 1e-6)
            compare_norms(golden, run, i, model.segmentor, teacher, exact)
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
        agree(norms(named(model.segmentor, sources), names)[settled],
              golden[f'{run}param_norm'][i][settled],
              1e-11 if exact else WEIGHTS)
    if not drawn:
        compare_tensors(golden, run, 'param', model, sources)


def without_gradient(name):
    """Analytically zero: AdamW turns the rounding noise into steps.

    The keys' half of a bias of attention, and what a batch norm right after
    an embedding takes away.
    """
    return 'attn.kv.bias' in name or (
        'scale_attention.embed_layers' in name and name.endswith('bias'))


def compare_labels(golden, run, drawn, i, step, exact):
    """Pseudo-labels, their weight, and the labels of what is learnt from."""
    off = 0 if exact else 2
    pseudo = step.pseudo_label('target')
    assert (pseudo.labels.numpy() != golden[f'{drawn}pseudo_label'][i]).sum(
    ) <= off
    q = float(pseudo.parts[0][0])
    assert abs(q - golden[f'{run}q'][i]) <= (1e-7 if exact else 2.5 / 32768)
    mixed = step.view('mixed_strong').labels.numpy()
    assert (mixed != golden[f'{drawn}mixed_label'][i]).sum() <= off
    masked = step.view('masked')
    wanted = golden[f'{drawn}masked_label' if drawn else 'pseudo_label'][i]
    assert (masked.labels.numpy() != wanted).sum() <= off
    assert np.array_equal(masked.weights > 0,
                          golden[f'{drawn}masked_weight_on'][i])
    agree(masked.weights.amax((1, 2)), golden[f'{drawn}masked_weight_max'][i],
          1e-6 if exact else 3e-3)
    parts = sum(scale * mask for scale, mask in masked.weight_parts)
    agree(parts, masked.weights, 1e-7)


def compare_images(golden, drawn, i, step):
    for view, name in (('mixed_strong', 'mixed_img'),
                       ('masked', f'{drawn}masked_img')):
        if f'{name}_s8' in golden and not (drawn and name == 'mixed_img'):
            agree(step.view(view).images[..., ::8, ::8],
                  golden[f'{name}_s8'][i], 0, 1e-5)


def compare_logits(golden, i, taught, students):
    """Context, detail, attention and fused logits of all passes."""
    (teacher, ) = taught
    found = dict(teacher_raw_lr=teacher.context, teacher_att=teacher.attention,
                 teacher_hr=teacher.detail, teacher_fused=teacher.fused)
    for name, one in students.items():
        found.update({
            f'{name}_raw_lr': one.context, f'{name}_hr': one.detail,
            f'{name}_att': one.attention, f'{name}_fused': one.fused})
    compared = 0
    for name, maps in found.items():
        for every in (2, 4):
            key = f'{name}_s{every}'
            if key in golden:
                agree(maps.detach()[..., ::every, ::every], golden[key][i],
                      0, LOGITS)
                compared += 1
    assert compared == 13


def compare_rates(golden, i, wrapper, model, sources):
    """Learning rates, to 7 digits; base rates and decays exactly."""
    groups = {id(one): group for group in wrapper.optimizer.param_groups
              for one in group['params']}
    ours = {key: groups[id(one)] for name, one in
            model.segmentor.named_parameters() for key in sources[name]}
    for mine, theirs, relative in (
            ('lr', golden['lr'][i], 1e-7),
            ('initial_lr', golden['param_base_lr'], 1e-12),
            ('weight_decay', golden['param_weight_decay'], 1e-12)):
        agree([ours[str(name)][mine] for name in golden['param_names']],
              theirs, relative)


def compare_norms(golden, run, i, student, teacher, exact):
    """Running statistics of head and attention."""
    for who, net in (('student', student), ('teacher', teacher)):
        head = net.decode_head
        for name, norm in (
                ('head', head.head.fuse_layer.bottleneck.bn),
                ('att', head.scale_attention.fuse_layer.bn)):
            key = f'{run}bn_{who}/{name}'
            assert int(norm.num_batches_tracked) == golden[
                f'{key}.num_batches_tracked'][i]
            for part in ('running_mean', 'running_var'):
                if name == 'att' and part == 'running_mean' and i:
                    # Moved by the biases that have no gradient.
                    continue
                agree(getattr(norm, part), golden[f'{key}.{part}'][i],
                      1e-10 if exact else 2e-5, 1e-12 if exact else 5e-6)


def compare_tensors(golden, run, kind, model, sources):
    """Some tensors of the last step in full."""
    tensors = named(model.segmentor, sources, kind)
    stored, start = golden[f'{run}{kind}'], 0
    for name in golden['head_tensors' if 'sep' in run else 'tensors']:
        found = tensors[str(name)].double().numpy().ravel()
        wanted = stored[start:start + found.size]
        start += found.size
        if kind == 'grad':
            agree(found, wanted, 0, 1e-10 * float(np.abs(wanted).max()))
        else:
            agree(found, wanted, 0, 1e-12 if run == 'f64/' else 2e-6)
    assert start == len(stored)


def test_golden_feature_distance_sees_the_context(golden):
    """Features and labels at half the resolution, as published."""
    model, _ = build_model(golden, torch.float32, '')
    from mmseg_contrast.ops import downscale_labels
    for i in range(3):
        labels = downscale_labels(
            torch.from_numpy(golden['src_label'][i]).long(), 64, CLASSES)
        assert np.array_equal(labels.numpy(), golden['fd_label'][i])
        things = model.objectives['feature_distance'].things[labels]
        assert np.array_equal(things.numpy(), golden['fd_mask'][i] > 0)
        assert golden['fd_mask'][i].any()
