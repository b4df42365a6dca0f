"""Three steps of the published SePiCo code (DistCL), number by number.

tests/data/README.md says where the numbers come from. The published draws
are injected; everything else is this package's own.

Three things that are no part of the method are brought about by hand:

- The published code ignores the top and the bottom rows of the crop, not of
  the image: the stream's margins are put where they become these.
- It skips the projection before contrast starts, so AdamW does not know it
  then; here it has zero gradients, with which AdamW would decay the weights
  and begin to count. The test takes them away.
- Its teacher's decode head also sees the weak source, in the first iteration
  twice, and nobody uses what comes out. The running statistics are only
  equal after the same passes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from test_golden_daformer import (
    CLASSES,
    agree,
    build_optimizer,
    named,
    norms,
    published_student,
)

from mmseg_contrast.models.legacy import convert_student

DATA = Path(__file__).resolve().parent / 'data'
RUNS = {'f32': (torch.float32, 100.), 'f64': (torch.float64, 100.),
        'f64_tau0.1': (torch.float64, 0.1)}
LOSSES = {
    'source.decode.loss_ce': 'src.decode.loss_seg',
    'contrast.loss_source_strong': 'src.aux.loss_cl',
    'contrast.loss_target_strong': 'tgt.aux.loss_cl',
    'mixed.decode.loss_ce': 'mix.decode.loss_seg'}
STRONG = dict(source_strong='source', target_strong='target_crop',
              mixed_strong='mixed')
#: Rows of the crop that are ignored: the first 4 and the last 8.
TOP, BOTTOM, CROP = 4, 8, 64


@pytest.fixture(scope='module')
def golden():
    recording = {}
    for name in ('dacs_4iter', 'sepico_step'):
        with np.load(DATA / f'{name}.npz') as file:
            if name == 'dacs_4iter':
                recording.update({key: file[key] for key in file.files
                                  if key.startswith('student_')})
            else:
                recording.update({key: file[key] for key in file.files})
    return recording


def build_model(golden, dtype, tau):
    """The tiny net of the recording, as a config."""
    teach = dict(type='ConfidentFraction', threshold=0.39)
    model = MODELS.build(dict(
        type='UDASegmentor',
        segmentor=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor', mean=golden['mean_rgb'].tolist(),
                std=golden['std_rgb'].tolist(), bgr_to_rgb=True,
                size=(64, 64)),
            backbone=dict(
                type='ReferenceMixVisionTransformer', embed_dims=8,
                num_layers=(1, 1, 1, 1), drop_path_rate=0.0),
            decode_head=dict(
                type='DAFormerHead', in_channels=[8, 16, 40, 64],
                channels=16, embed_dims=16, num_classes=CLASSES,
                dropout_ratio=0.0),
            auxiliary_head=dict(
                type='ContrastHead', in_channels=[8, 16, 40, 64],
                in_index=[0, 1, 2, 3], input_transform='resize_concat',
                num_classes=CLASSES, channels=16,
                projection=dict(
                    layers=2, hidden_channels=32, last_act=True),
                bank=dict(type='GaussianBank'), label_rule='ratio',
                tau=tau, own='energy', regularizer=1., start=1,
                update='before'),
            train_cfg=dict(), test_cfg=dict(mode='whole')),
        teachers=dict(ema=dict(type='EMATeacher', alpha=0.999)),
        pseudo_labels=dict(
            target_full=dict(teach, view='target'),
            target=dict(teach, view='target_crop')),
        views=dict(
            target_crop=dict(type='BalancedCrop', size=(CROP, CROP)),
            mixed=dict(type='ClassMix', target='target_crop'), **{
                name: dict(type='StrongAugment', view=view)
                for name, view in STRONG.items()}),
        objectives=dict(
            source=dict(type='Segmentation', view='source_strong'),
            mixed=dict(type='Segmentation', view='mixed_strong'),
            contrast=dict(
                type='Contrast', anchors=('source_strong', 'target_strong'),
                bank=('source', ), bank_from='teacher',
                pseudo_labels=dict(target_strong='target')))))
    converted = convert_student(published_student(golden))
    weights, sources = dict(converted.weights), dict(converted.sources)
    for key in golden:
        if key.startswith('student/'):
            theirs = key.removeprefix('student/')
            mine = theirs.replace('head.convs.', 'head.projection.layers.')
            weights[mine] = torch.from_numpy(golden[key])
            sources[mine] = [theirs]
    found = model.segmentor.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(('auxiliary_head.bank.',
                               'auxiliary_head.clock.'))
               for key in found.missing_keys), found.missing_keys
    model.keep_step = True
    return model.to(dtype).train(), sources


def inject(model, golden, i):
    """Make the model draw what the published code drew."""
    def drawn(name):
        return torch.as_tensor(golden[f'draw/{name}'][i])

    chosen = torch.zeros(2, CLASSES + 1, dtype=torch.bool)
    for row, classes in zip(chosen, drawn('chosen_classes'), strict=True):
        row[classes.clamp_max(CLASSES)] = True
    model.views['mixed'].choose = lambda present, generator: chosen
    model.views['target_crop'].draw = (
        lambda samples, height, width, generator: drawn('crop_offsets'))
    for name in STRONG:
        view = name.removesuffix('_strong')
        factors = drawn(f'{view}_factors').clone()
        # A float32 pi, see test_golden_daformer.
        factors[:, 3] *= float(np.float32(np.pi)) / np.pi
        draws = dict(
            jitter=bool(drawn('switch_jitter') > 0.2),
            blur=bool(drawn('switch_blur') > 0.5), factors=factors,
            order=drawn(f'{view}_order'), sigma=drawn(f'{view}_sigma'))
        model.views[name].draw = (
            lambda samples, generator, draws=draws: draws)


def inputs(golden, run, i, dtype):
    """The batch as the preprocessor would give it."""
    mean, std = (torch.from_numpy(golden[key]).view(3, 1, 1)
                 for key in ('mean_rgb', 'std_rgb'))

    def images(name):
        raw = torch.from_numpy(golden[name][i]).float()
        return ((raw - mean) / std).to(dtype)

    source = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in
              torch.from_numpy(golden['src_label'][i]).long()]
    target = []
    for top, _ in golden[f'{run}/crop_offset_chosen'][i]:
        region = torch.zeros(1, 96, 96, dtype=torch.uint8)
        region[:, top + TOP:top + CROP - BOTTOM] = 1
        target.append(SegDataSample(valid_region=PixelData(data=region)))
    return (dict(source=images('src_img_u8'), target=images('tgt_img_u8')),
            dict(source=source, target=target))


@pytest.mark.parametrize('run', RUNS)
def test_golden_three_steps(golden, run):
    dtype, tau = RUNS[run]
    exact = dtype is torch.float64
    torch.set_num_threads(1)
    model, sources = build_model(golden, dtype, tau)
    wrapper, schedulers = build_optimizer(model, 1499)
    names = golden['param_names']
    # The keys' half of this bias has no gradient but rounding noise, which
    # AdamW turns into steps.
    settled = np.array(['attn.kv.bias' not in str(name) for name in names])
    projection = list(model.segmentor.auxiliary_head.parameters())
    assert len(projection) == (~golden['f64/has_grad'][0]).sum()

    for i in range(3):
        inject(model, golden, i)
        batch = inputs(golden, run, i, dtype)
        losses = model.loss(*batch)
        wrapper.zero_grad()
        sum(value for key, value in losses.items()
            if 'loss' in key).backward()
        step = model.last_step

        compare_target(golden, run, i, step, exact)
        if run == 'f64':
            compare_views(golden, i, step)
            compare_rates(golden, i, wrapper, model, sources)
        bank = model.segmentor.auxiliary_head.bank
        assert np.array_equal(bank.count, golden[f'{run}/count'][i])
        agree(bank.mean, golden[f'{run}/mean'][i], 0,
              1e-13 if exact else 5e-7)
        agree(bank.variance, golden[f'{run}/var'][i], 0,
              1e-13 if exact else 5e-7)

        for mine, theirs in LOSSES.items():
            wanted = golden[f'{run}/log/{theirs}'][i]
            assert (mine in losses) == np.isfinite(wanted)
            if mine in losses:
                # mmseg adds 1.2e-7 to the number of pixels: 1.5e-11.
                agree(losses[mine].detach(), wanted, 2e-6 if not exact else
                      1e-10 if 'decode' in mine else 1e-13)
        if i == 0:  # contrast has not begun
            assert all(not one.grad.any() for one in projection)
        if exact:
            agree(norms(named(model.segmentor, sources, 'grad'), names),
                  golden[f'{run}/grad_norm'][i], 1e-9, 1e-12)
            if i == 2:
                compare_tensors(golden, run, 'grad', model, sources)
        if run == 'f64':
            taught = norms(named(model.teachers['ema'].model, sources), names)
            agree(taught[settled], golden['f64/teacher_norm'][i][settled],
                  1e-11)
            compare_norms(golden, i, model, batch[0]['source'])

        if i == 0:
            for parameter in projection:
                parameter.grad = None
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
        if exact:
            found = norms(named(model.segmentor, sources), names)
            agree(found[settled], golden[f'{run}/param_norm'][i][settled],
                  1e-11)
    compare_tensors(golden, run, 'param', model, sources)


def compare_target(golden, run, i, step, exact):
    """The teacher's labels, the crop that they choose, and its own labels."""
    off = 0 if exact else 2
    full = step.pseudo_label('target_full').labels.numpy()
    pseudo = step.pseudo_label('target')
    if run != 'f64_tau0.1':  # of which the labels were not kept
        assert (full != golden['f64/pseudo_label_before_crop'][i]).sum(
        ) <= off
        assert (pseudo.labels.numpy() != golden['f64/pseudo_label'][i]).sum(
        ) <= off
    q = float(pseudo.parts[0][0])
    assert abs(q - golden[f'{run}/q'][i]) <= (1e-7 if exact else 2.5 / 8192)

    crop, target = step.view('target_crop'), step.view('target')
    for n, (top, left) in enumerate(golden[f'{run}/crop_offset_chosen'][i]):
        rows = slice(top, top + CROP)
        columns = slice(left, left + CROP)
        assert torch.equal(
            crop.images[n], target.images[n, :, rows, columns])
        assert torch.equal(crop.valid[n], target.valid[n, rows, columns])
    # The margins of the crop, see the docstring of this file.
    assert crop.valid[:, TOP:-BOTTOM].all()
    assert not crop.valid[:, :TOP].any()
    assert not crop.valid[:, -BOTTOM:].any()


def compare_views(golden, i, step):
    """Images, labels and weights, and what the teacher saw in them."""
    for name, theirs, first in (('source_strong', 'src', 0),
                                ('target_strong', 'tgt', 1),
                                ('mixed_strong', 'mix', 0)):
        if i < first:
            continue
        images = step.view(name).images
        key = f'f64/forward/{theirs}_img'
        agree(images[..., ::8, ::8], golden[f'{key}_s8'][i - first], 0, 1e-6)
        agree(images.sum(), golden[f'{key}_sum'][i - first], 1e-11)
    assert np.array_equal(step.view('source_strong').labels,
                          golden['src_label'][i])
    mixed = step.view('mixed_strong')
    assert np.array_equal(mixed.labels, golden['f64/forward/mix_label'][i])
    agree(mixed.weights[:, ::4, ::4],
          golden['f64/forward/mix_weight_s4'][i], 1e-7)
    if i:
        pseudo = step.pseudo_label('target')
        assert np.array_equal(
            pseudo.labels.where(pseudo.weights > 0, 255),
            golden['f64/forward/tgt_label'][i - 1])
    logits = torch.from_numpy(golden['f64/teacher_logits_crop_s4'][i])
    agree(step.predictions['ema', 'target_crop'][..., ::4, ::4],
          logits.double().softmax(1).numpy(), 0, 1e-6)
    agree(step.passes['ema', 'source'].embed('aux')[..., ::4, ::4],
          golden['f64/teacher_feat_s4'][i], 0, 1e-13)


def compare_rates(golden, i, wrapper, model, sources):
    """Learning rates, to 7 digits; base rates and decays exactly."""
    groups = {id(one): group for group in wrapper.optimizer.param_groups
              for one in group['params']}
    ours = {key: groups[id(one)] for name, one in
            model.segmentor.named_parameters() for key in sources[name]}
    for mine, theirs, relative in (
            ('lr', golden['f64/lr'][i], 1e-7),
            ('initial_lr', golden['param_base_lr'], 1e-12),
            ('weight_decay', golden['param_weight_decay'], 1e-12)):
        agree([ours[str(name)][mine] for name in golden['param_names']],
              theirs, relative)


def compare_norms(golden, i, model, source):
    """Running statistics after the same passes."""
    teacher = model.teachers['ema'].model
    with torch.no_grad():
        for _ in range(2 if i == 0 else 1):
            teacher.decode_head(teacher.extract_feat(source))
    for who, net in (('student', model.segmentor), ('teacher', teacher)):
        layers = net.auxiliary_head.projection.layers
        for key, norm in (
                ('fuse_layer.bottleneck.bn',
                 net.decode_head.fuse_layer.bottleneck.bn),
                ('convs.0.bn', layers[0].bn), ('convs.1.bn', layers[1].bn)):
            key = f'f64/bn_{who}/{key}'
            assert int(norm.num_batches_tracked) == golden[f'{key}/count'][i]
            for name in ('running_mean', 'running_var'):
                agree(getattr(norm, name), golden[f'{key}/{name}'][i], 1e-10,
                      1e-12)


def compare_tensors(golden, run, kind, model, sources):
    """Some tensors of the last step in full."""
    tensors = named(model.segmentor, sources, kind)
    stored, start = golden[f'{run}/{kind}'], 0
    for name in golden['tensors']:
        found = tensors[str(name)].double().numpy().ravel()
        wanted = stored[start:start + found.size]
        start += found.size
        if kind == 'grad':
            agree(found, wanted, 0, 1e-10 * float(np.abs(wanted).max()))
        else:
            agree(found, wanted, 0, 2e-6 if run == 'f32' else 1e-12)
    assert start == len(stored)
