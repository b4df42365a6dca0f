"""One iteration: laziness, gradients, randomness, order."""

import copy

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn

from helpers import (
    TinyBackbone,
    batch,
    build,
    dacs_parts,
    run,
    tiny_student,
    total,
)
from mmseg_contrast.adaptation import segmentor as segmentor_module
from mmseg_contrast.models import data_preprocessor


def gradients(model, data):
    model.zero_grad()
    losses = run(model, data)
    total(losses).backward()
    return losses, {k: p.grad.clone() for k, p in
                    model.segmentor.named_parameters()}


def test_each_forward_is_computed_once(monkeypatch):
    model = build()
    counts = dict(student=0, teacher=0)
    real = model.segmentor.backbone.forward
    taught = model.teachers['ema'].model.extract_feat

    def student(*args):
        counts['student'] += 1
        return real(*args)

    def teacher(*args):
        counts['teacher'] += 1
        return taught(*args)

    monkeypatch.setattr(model.segmentor.backbone, 'forward', student)
    monkeypatch.setattr(model.teachers['ema'].model, 'extract_feat', teacher)
    run(model, batch())
    assert counts == dict(student=2, teacher=1)
    # A second objective on the same views costs no further pass.
    model = build(**dacs_parts(objectives=dict(
        source=dict(type='Segmentation', view='source'),
        again=dict(type='Segmentation', view='source'),
        mixed=dict(type='Segmentation', view='mixed_strong'))))
    real = model.segmentor.backbone.forward
    monkeypatch.setattr(model.segmentor.backbone, 'forward', student)
    counts.update(student=0)
    run(model, batch())
    assert counts['student'] == 2


def test_nothing_runs_that_no_objective_asks_for(monkeypatch):
    model = build(**dacs_parts(objectives=dict(
        source=dict(type='Segmentation', view='source'))))
    monkeypatch.setattr(model.teachers['ema'], 'predict', None)
    model.keep_step = True
    run(model, batch())
    assert set(model.last_step.views) == {'source', 'target'}
    assert set(model.last_step.students) == {'source'}


def test_the_mixed_loss_is_the_weighted_cross_entropy():
    model = build()
    model.keep_step = True
    losses = run(model, batch())
    step = model.last_step
    view = step.view('mixed_strong')
    logits = nn.functional.interpolate(
        step.student('mixed_strong').logits, (32, 32), mode='bilinear')
    pixel = nn.functional.cross_entropy(
        logits, view.labels, reduction='none', ignore_index=255)
    want = 0.
    origin, q = view.extras['origin'], step.pseudo_labels['target'].parts[0][0]
    for i in range(2):
        for y in range(32):
            for x in range(32):
                weight = 1. if origin[i, y, x] else q.item()
                want += weight * pixel[i, y, x].item()
    assert 0 < q < 1
    assert losses['mixed.decode.loss_ce'].item() == pytest.approx(
        want / (2 * 32 * 32), rel=1e-4)
    assert losses['target.confident_ratio'] == q


def test_mixed_pixels_come_from_where_they_say():
    model = build()
    model.keep_step = True
    run(model, batch())
    step = model.last_step
    mixed, source, target = (
        step.view(name) for name in ('mixed', 'source', 'target'))
    origin = mixed.extras['origin']
    assert 0 < origin.float().mean() < 1
    pseudo = step.pseudo_labels['target']
    for i in range(2):
        keep = origin[i]
        assert torch.equal(mixed.images[i][:, keep],
                           source.images[i][:, keep])
        assert torch.equal(mixed.images[i][:, ~keep],
                           target.images[i][:, ~keep])
        assert torch.equal(mixed.labels[i][keep], source.labels[i][keep])
        assert torch.equal(mixed.labels[i][~keep], pseudo.labels[i][~keep])
        assert (mixed.weights[i][keep] == 1).all()
        assert torch.equal(mixed.weights[i][~keep],
                           pseudo.weights[i][~keep])
    dense = sum(scale * mask for scale, mask in mixed.weight_parts)
    assert torch.equal(dense, mixed.weights)


def test_the_teacher_has_no_gradient_and_follows():
    model = build()
    optimizer = torch.optim.SGD(model.segmentor.parameters(), 0.5)
    teacher = model.teachers['ema']
    want = None
    for step in range(4):
        student = [p.detach().clone() for p in model.segmentor.parameters()]
        alpha = min(1 - 1 / (step + 1), 0.99)
        want = student if want is None else [
            alpha * t + (1 - alpha) * s
            for t, s in zip(want, student, strict=True)]
        optimizer.zero_grad()
        losses = run(model, batch(seed=step))
        assert losses['ema.momentum'].item() == pytest.approx(alpha)
        total(losses).backward()
        optimizer.step()
        for got, one in zip(teacher.model.parameters(), want, strict=True):
            torch.testing.assert_close(got, one)
    assert all(p.grad is None and not p.requires_grad
               for p in teacher.parameters())


@pytest.mark.parametrize('extra', [
    dict(type='Segmentation', view='mixed', weight=0.),
    dict(type='Segmentation', view='extra_strong', weight=0.)])
def test_an_objective_of_weight_0_changes_nothing(extra):
    plain = build(tiny_student(dropout=0.3))
    parts = dacs_parts()
    parts['views']['extra_strong'] = dict(type='StrongAugment',
                                          view='target')
    if extra['view'] == 'extra_strong':
        parts['views']['extra'] = dict(
            type='ClassMix', source='source', target='target')
        parts['views']['extra_strong']['view'] = 'extra'
    parts['objectives'] = dict(aaa=extra, **parts['objectives'])
    more = build(tiny_student(dropout=0.3), **parts)
    for seed in range(2):
        one, first = gradients(plain, batch(seed=seed))
        two, second = gradients(more, batch(seed=seed))
        for key, value in one.items():
            assert torch.equal(two[key], value), key
        for key, value in first.items():
            assert torch.equal(second[key], value), key
    # Batch-norm statistics included.
    for key, value in plain.segmentor.state_dict().items():
        assert torch.equal(more.segmentor.state_dict()[key], value), key


def test_the_order_of_objectives_does_not_matter():
    parts = dacs_parts()
    one = build(tiny_student(dropout=0.3), **parts)
    parts['objectives'] = dict(reversed(parts['objectives'].items()))
    two = build(tiny_student(dropout=0.3), **parts)
    first, second = gradients(one, batch()), gradients(two, batch())
    assert first[0].keys() == second[0].keys()
    for a, b in ((first[0], second[0]), (first[1], second[1]),
                 (one.state_dict(), two.state_dict())):
        for key, value in a.items():
            assert torch.equal(b[key], value), key


def test_draws_depend_on_seed_and_iteration(monkeypatch):
    def origin(seed, iterations=1):
        hub = segmentor_module.MessageHub.get_current_instance()
        monkeypatch.setattr(
            type(hub), 'get_info',
            lambda self, key, default=None: seed if key == 'seed' else
            default)
        model = build()
        model.keep_step = True
        for _ in range(iterations):
            run(model, batch())
        return model.last_step.view('mixed').extras['origin']

    assert torch.equal(origin(1), origin(1))
    assert not torch.equal(origin(1), origin(2))
    assert not torch.equal(origin(1), origin(1, 2))


def test_the_default_generator_is_left_alone():
    model = build(tiny_student(dropout=0.3))
    before = torch.get_rng_state()
    run(model, batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_layers_are_off_in_the_teacher():
    from mmcv.cnn.bricks import DropPath
    student = tiny_student(dropout=0.5)
    model = build(student)
    model.teachers['ema'].model.backbone.path = DropPath(0.5)
    model.teachers['ema']._mode = model._mode = None
    model.train()
    teacher = model.teachers['ema'].model
    for part in teacher.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.training
        elif isinstance(part, (nn.Dropout, nn.Dropout2d, DropPath)):
            assert not part.training
    model.eval()
    assert not any(part.training for part in teacher.modules())


def test_sync_norms_that_runner_replaces_are_found():
    from mmengine.model import revert_sync_batchnorm
    student = tiny_student(norm_cfg=dict(type='SyncBN'))
    model = revert_sync_batchnorm(build(student).eval()).train()
    norms = [part for part in model.teachers['ema'].model.modules()
             if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 3
    assert all(norm.training and type(norm) is not nn.SyncBatchNorm
               for norm in norms)


def test_all_of_a_batch_is_sent_without_waiting(monkeypatch):
    model = build()
    sent = []
    monkeypatch.setattr(data_preprocessor, 'send', lambda values, device: (
        sent.append(tuple(values.shape)) or values))
    model.data_preprocessor(batch(), True)
    # Two images of each domain, and the labels of one.
    assert sorted(sent) == [(1, 32, 32)] * 2 + [(3, 32, 32)] * 4


@pytest.mark.parametrize('batch_norm', ['batch', 'ema'])
def test_sync_bn_of_the_runner_keeps_all_modes(batch_norm):
    """``sync_bn = 'torch'``: mmengine's new norms are in training mode."""
    from mmengine.model import convert_sync_batchnorm
    parts = dacs_parts(teachers=dict(
        ema=dict(type='EMATeacher', batch_norm=batch_norm)))
    plain = build(**parts)
    modes = {name: part.training for name, part in plain.named_modules()}
    # As Runner does it: the model is built, converted, and then trained.
    model = convert_sync_batchnorm(MODELS.build(dict(
        type='UDASegmentor', segmentor=tiny_student(), **parts)), 'torch')
    model.train()
    assert {name: part.training
            for name, part in model.named_modules()} == modes
    norms = [part for part in model.segmentor.modules()
             if isinstance(part, nn.SyncBatchNorm)]
    assert len(norms) == 3
    with model.adapter.batch_norm(False):  # these are the ones that are held
        assert not any(norm.track_running_stats for norm in norms)
    assert all(norm.track_running_stats for norm in norms)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_norms_that_the_student_freezes_stay_frozen_in_the_teacher():
    @MODELS.register_module(force=True)
    class FrozenNorms(TinyBackbone):

        def train(self, mode=True):
            super().train(mode)
            self.layers[0][1].eval()
            return self

    student = tiny_student()
    student['backbone'] = dict(type='FrozenNorms')
    model = build(student)
    layers = model.teachers['ema'].model.backbone.layers
    assert not layers[0][1].training and layers[1][1].training


def test_buffers_of_the_teacher_follow():
    model = build()
    student, teacher = model.segmentor, model.teachers['ema']
    for net in (student, teacher.model):
        net.register_buffer('bases', torch.zeros(3))
    with torch.no_grad():
        student.bases.fill_(5.)
        student.backbone.layers[0][1].running_mean.fill_(7.)
    # At first everything is the student's: it may have been pretrained.
    teacher.update(student)
    own = teacher.model.backbone.layers[0][1].running_mean
    assert (own == 7).all() and (teacher.model.bases == 5).all()
    with torch.no_grad():
        student.bases.fill_(6.)
        student.backbone.layers[0][1].running_mean.fill_(8.)
    teacher.update(student)
    # Then batch norm keeps its own statistics, other buffers follow.
    assert (own == 7).all() and (teacher.model.bases == 6).all()


def test_the_teacher_follows_replaced_parameters():
    model = build()
    teacher = model.teachers['ema']
    teacher.update(model.segmentor)
    state = {k: v + 1 if v.is_floating_point() else v
             for k, v in model.segmentor.state_dict().items()}
    model.segmentor.load_state_dict(state, assign=True)
    before = teacher.model.decode_head.conv_seg.weight.clone()
    teacher.update(model.segmentor)
    torch.testing.assert_close(
        teacher.model.decode_head.conv_seg.weight, before + .5)


def test_two_policies_log_under_their_own_names():
    parts = dacs_parts()
    parts['pseudo_labels']['sure'] = dict(
        type='ConfidentFraction', threshold=0.9)
    parts['views']['other'] = dict(type='ClassMix', pseudo_label='sure')
    parts['objectives']['other'] = dict(type='Segmentation', view='other')
    losses = run(build(**parts), batch())
    assert losses['sure.confident_ratio'] < losses['target.confident_ratio']


def test_stock_segmentors_of_other_kinds_are_refused_by_name():
    from mmseg.models import FCNHead, segmentors

    from mmseg_contrast.adaptation.heads import adapt_head
    from mmseg_contrast.adaptation.students import check_segmentor
    for name in ('MultimodalEncoderDecoder', 'DepthEstimator'):
        cls = getattr(segmentors, name)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        with pytest.raises(ValueError, match=name):
            check_segmentor(model)
    for name in ('VPDDepthHead', 'SideAdapterCLIPHead'):
        cls = type(name, (FCNHead, ), {})
        head = cls.__new__(cls)
        with pytest.raises(ValueError, match=name):
            adapt_head(head, 'model.segmentor.decode_head')


def test_what_needs_precision_keeps_it_under_autocast():
    model = build()
    model.keep_step = True
    with torch.autocast('cpu', torch.bfloat16):
        losses = run(model, batch())
    step = model.last_step
    assert step.student('source').logits.dtype == torch.bfloat16
    assert step.view('mixed_strong').images.dtype == torch.float32
    assert step.teacher('ema', 'target').dtype == torch.float32
    pseudo = step.pseudo_labels['target']
    assert pseudo.weights.dtype == pseudo.confidence.dtype == torch.float32
    assert all(value.dtype == torch.float32 for key, value in losses.items()
               if 'loss' in key)
    assert all(p.dtype == torch.float32
               for p in model.teachers.parameters())


def test_a_conversion_moves_teacher_and_student_together():
    model = build()
    run(model, batch())
    model.double()
    with torch.no_grad():
        for p in model.segmentor.parameters():
            p.add_(1.)
    before = [p.clone() for p in model.teachers['ema'].model.parameters()]
    model.teachers['ema'].update(model.segmentor)
    for old, new, own in zip(
            before, model.teachers['ema'].model.parameters(),
            model.segmentor.parameters(), strict=True):
        torch.testing.assert_close(new, .5 * old + .5 * own)


def test_batch_norm_of_the_teacher():
    data = batch()
    for mode in ('batch', 'ema'):
        parts = dacs_parts(teachers=dict(
            ema=dict(type='EMATeacher', alpha=0.99, batch_norm=mode)))
        model = build(**parts)
        norm = model.teachers['ema'].model.backbone.layers[0][1]
        own = model.segmentor.backbone.layers[0][1]
        with torch.no_grad():
            own.running_mean.fill_(3.)
        run(model, data)
        if mode == 'ema':
            # The first update copies what the student had before its pass.
            assert (norm.running_mean == 3).all()
        else:
            assert norm.num_batches_tracked == 1
            assert not (norm.running_mean == 3).any()


def test_valid_region_and_padding_silence_pseudo_labels():
    from mmengine.structures import PixelData
    model = build()
    data = batch()
    region = torch.ones(1, 32, 32, dtype=torch.uint8)
    region[:, :5] = 0
    data['data_samples']['target'][0].set_data(
        dict(valid_region=PixelData(data=region)))
    data['inputs']['target'][1] = data['inputs']['target'][1][:, :20]
    model.keep_step = True
    losses = run(model, data)
    pseudo = model.last_step.pseudo_labels['target']
    q = pseudo.parts[0][0]
    assert (pseudo.weights[0, :5] == 0).all()
    assert (pseudo.weights[0, 5:] == q).all()
    assert (pseudo.weights[1, 20:] == 0).all()
    assert (pseudo.weights[1, :20] == q).all()
    assert losses['target.pseudo_weight'].item() == pytest.approx(
        q.item() * (27 + 20) / 64)


def test_streams_with_a_ratio_are_flattened():
    model = build(**dacs_parts(objectives=dict(
        source=dict(type='Segmentation', view='source'))))
    data = batch(samples=4)
    data['inputs']['target'] = [data['inputs']['target'][:2],
                                data['inputs']['target'][2:]]
    data['data_samples']['target'] = [data['data_samples']['target'][:2],
                                      data['data_samples']['target'][2:]]
    model.keep_step = True
    run(model, data)
    assert model.last_step.view('target').images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize('case', ['ignored', 'unsure', 'single'])
def test_degenerate_batches_give_finite_losses(case):
    model = build(**dacs_parts(pseudo_labels=dict(target=dict(
        type='ConfidentFraction',
        threshold=1.0 if case == 'unsure' else 0.3))))
    data = batch()
    for one in data['data_samples']['source']:
        if case != 'unsure':
            one.gt_sem_seg.data.fill_(255 if case == 'ignored' else 2)
    losses, grads = gradients(model, data)
    assert all(torch.isfinite(v).all() for v in losses.values())
    assert all(torch.isfinite(v).all() for v in grads.values())
    if case == 'unsure':
        assert losses['target.confident_ratio'] == 0
    if case == 'ignored':
        assert losses['source.decode.loss_ce'] == 0


def test_target_labels_are_not_used():
    model = build()
    data = batch()
    labelled = copy.deepcopy(data)
    from mmengine.structures import PixelData
    for one in labelled['data_samples']['target']:
        one.gt_sem_seg = PixelData(data=torch.ones(1, 32, 32).long())
    first = run(model, data)
    model = build()
    second = run(model, labelled)
    for key, value in first.items():
        assert torch.equal(second[key], value)


@pytest.mark.parametrize('parts,words', [
    (dict(objectives={}), ['model.objectives']),
    (dict(teachers={}), ['model.pseudo_labels.target.teacher', 'ema']),
    (dict(pseudo_labels={}), ['model.views.mixed.pseudo_label']),
    (dict(predict_with='nobody'), ['model.predict_with', 'nobody']),
    (dict(views=dict(mixed=dict(type='ClassMix', target='mixed'),
                     mixed_strong=dict(type='StrongAugment',
                                       view='mixed'))), ['circle', 'mixed']),
    (dict(views=dict(mixed=dict(type='ClassMix', clas_scope='batch'))),
     ['model.views.mixed', 'clas_scope']),
    (dict(views=dict(mixed=dict(type='ClassMix', class_scope='all'))),
     ['class_scope', 'all']),
    (dict(objectives={'my.loss': dict(type='Segmentation', view='source')}),
     ['my.loss']),
    (dict(objectives=dict(a=dict(type='Segmentatoin', view='source'))),
     ['model.objectives.a.type', 'Segmentatoin']),
    (dict(pseudo_labels=dict(target=dict(type='ConfidentFraction',
                                         threshold=2.))),
     ['threshold', '2.0']),
    (dict(pseudo_labels=dict(target=dict(type='ConfidentFraction',
                                         absent_classes=[7]))),
     ['absent_classes', '7']),
    (dict(teachers=dict(ema=dict(type='EMATeacher', alpha=1.5))),
     ['alpha', '1.5']),
    (dict(decode_head=dict(num_classes=3)),
     ['model.decode_head', 'model.segmentor.decode_head']),
    (dict(data_preprocessor=dict(type='SegDataPreProcessor', size=(9, 9))),
     ['data_preprocessor']),
])
def test_mistakes_in_the_config_are_named(parts, words):
    with pytest.raises(ValueError) as error:
        build(**dacs_parts(**parts))
    for word in words:
        assert word in str(error.value)


def test_mistakes_in_the_batch_are_named():
    model = build()
    data = batch()
    del data['inputs']['target'], data['data_samples']['target']
    with pytest.raises(ValueError, match="named 'target'"):
        run(model, data)
    plain = dict(inputs=batch()['inputs']['source'],
                 data_samples=batch()['data_samples']['source'])
    with pytest.raises(ValueError, match='StreamDataset'):
        run(model, plain)
    data = batch()
    data['inputs']['target'] = data['inputs']['target'][:1]
    data['data_samples']['target'] = data['data_samples']['target'][:1]
    with pytest.raises(ValueError, match='one shape'):
        run(model, data)
    unlabelled = build(**dacs_parts(objectives=dict(
        target=dict(type='Segmentation', view='target'))))
    with pytest.raises(ValueError, match="'target', which has no labels"):
        run(unlabelled, batch())


def test_unsuitable_students_are_refused_by_name():
    @MODELS.register_module(force=True)
    class NotASegmentor(nn.Module):
        data_preprocessor = nn.Identity()

        def __init__(self, data_preprocessor=None):
            super().__init__()

    with pytest.raises(ValueError, match='NotASegmentor'):
        build(dict(type='NotASegmentor'))
    from mmseg.models import EncoderDecoder

    @MODELS.register_module(force=True)
    class OwnLoss(EncoderDecoder):

        def loss(self, inputs, data_samples):
            return {}

    with pytest.raises(ValueError, match='OwnLoss.*loss'):
        build(dict(tiny_student(), type='OwnLoss'))

    @MODELS.register_module(force=True)
    class HasState(EncoderDecoder):

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.state = nn.Linear(1, 1)

    with pytest.raises(ValueError, match="HasState.*'state'"):
        build(dict(tiny_student(), type='HasState'))
