"""Weighted losses, for losses that take weights and those that don't."""

import itertools

import pytest
import torch
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.losses.kldiv_loss import KLDivLoss
from mmseg.registry import MODELS

from helpers import batch, build, dacs_parts, run, tiny_student
from mmseg_contrast.adaptation.heads import class_edges, detail_labels
from mmseg_contrast.adaptation.losses import (
    check_loss,
    takes_pixel_weights,
    weighted_loss,
)

LOGITS = torch.linspace(-2, 2, 24).view(2, 3, 2, 2)
LABELS = torch.tensor([[[0, 1], [2, 255]], [[255, 255], [1, 0]]])
WEIGHTS = torch.stack([torch.ones(2, 2), torch.full((2, 2), .25)])


def loss(**config):
    return MODELS.build(config)


def test_cross_entropy_has_the_published_values():
    ce = loss(type='CrossEntropyLoss')
    assert weighted_loss(ce, LOGITS, LABELS).item() == pytest.approx(
        0.870605, abs=1e-6)
    assert weighted_loss(ce, LOGITS, LABELS, WEIGHTS).item() == pytest.approx(
        0.570293, abs=1e-6)
    valid = loss(type='CrossEntropyLoss', avg_non_ignore=True)
    assert weighted_loss(valid, LOGITS, LABELS).item() == pytest.approx(
        1.392969, abs=1e-6)


@pytest.mark.parametrize('config,channels,takes', [
    (dict(type='CrossEntropyLoss'), 3, True),
    (dict(type='CrossEntropyLoss', class_weight=[1., 2., 3.]), 3, True),
    (dict(type='CrossEntropyLoss', use_sigmoid=True), 3, True),
    (dict(type='CrossEntropyLoss', use_sigmoid=True), 1, True),
    (dict(type='DiceLoss'), 3, False),
    (dict(type='LovaszLoss', reduction='none'), 3, False),
    (dict(type='TverskyLoss'), 3, False),
    (dict(type='OhemCrossEntropy'), 3, False),
    (dict(type='BoundaryLoss'), 1, False),
    (dict(type='HuasdorffDisstanceLoss'), 3, False),
])
def test_which_losses_take_a_weight_map(config, channels, takes):
    assert takes_pixel_weights(loss(**config), channels) is takes


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('class_weight,avg_non_ignore', [
    (None, False), (None, True), ([.5, 1., 3.], False), ([.5, 1., 3.], True)])
def test_what_cross_entropy_divides_by(class_weight, avg_non_ignore,
                                       weighted):
    of_mmseg = loss(
        type='CrossEntropyLoss', class_weight=class_weight,
        avg_non_ignore=avg_non_ignore, loss_weight=2.)
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=gen)
    labels = torch.randint(0, 3, (2, 4, 5), generator=gen)
    labels[0, :2] = labels[1, 0, 0] = 255
    weights = torch.rand(2, 4, 5, generator=gen) if weighted else None
    total, divisor = 0., 0.
    for n, y, x in itertools.product(range(2), range(4), range(5)):
        label = labels[n, y, x].item()
        if label == 255:
            # Counted by mmseg's default, but not where classes have weights.
            divisor += not avg_non_ignore and class_weight is None
            continue
        of_class = 1. if class_weight is None else class_weight[label]
        divisor += of_class
        total -= (of_class * (1. if weights is None else weights[n, y, x])
                  * logits[n, :, y, x].log_softmax(0)[label]).item()
    got = weighted_loss(of_mmseg, logits, labels, weights)
    assert got.item() == pytest.approx(2 * total / divisor, rel=1e-5)
    nothing = weighted_loss(
        of_mmseg, logits, torch.full_like(labels, 255), weights)
    assert nothing == 0


def test_a_loss_is_tried_where_its_tensors_are(monkeypatch):
    class Shifted(CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.register_buffer('shift', torch.zeros(1, 3, 1, 1))

        def forward(self, logits, *args, **kwargs):
            return super().forward(logits + self.shift, *args, **kwargs)

    # A model is built on the host, also where there is a GPU.
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert check_loss(Shifted(), 3, 'here')
    assert not check_loss(loss(type='OhemCrossEntropy'), 3, 'here')


def test_a_loss_that_can_do_neither_is_refused_by_key():
    with pytest.raises(ValueError, match='decode_head.loss_decode.*KLDiv'):
        check_loss(KLDivLoss(), 3,
                   'model.segmentor.decode_head.loss_decode')


def test_folding_is_exact_for_a_mean_over_all_pixels():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 8, 8), generator=gen)
    labels[:, 0] = 255
    mask = torch.rand(2, 8, 8, generator=gen) < 0.5
    q = torch.tensor(0.3, dtype=torch.float64)
    parts = ((torch.ones(()), mask), (q, ~mask))
    weights = torch.where(mask, 1., q)
    for config in (dict(), dict(use_sigmoid=True)):
        ce = loss(type='CrossEntropyLoss', **config)
        one = weighted_loss(ce, logits, labels, weights)
        two = weighted_loss(ce, logits, labels, weights, parts,
                            takes_map=False)
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('config', [
    dict(type='DiceLoss'), dict(type='OhemCrossEntropy'),
    dict(type='LovaszLoss', reduction='none')])
def test_folding_weighs_each_part_by_itself(config):
    one = loss(**config)
    labels = torch.tensor([[[0, 1, 2, 0]] * 4] * 2)
    logits = torch.randn(2, 3, 4, 4,
                         generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    q = torch.tensor(0.25)
    got = weighted_loss(one, logits, labels, torch.ones(2, 4, 4),
                        ((torch.ones(()), mask), (q, ~mask)), takes_map=False)
    kept = [torch.where(m, labels, 255) for m in (mask, ~mask)]
    want = one(logits, kept[0]) + .25 * one(logits, kept[1])
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_a_part_without_labels_costs_nothing():
    ohem = loss(type='OhemCrossEntropy', min_kept=1)
    logits = LOGITS.clone().requires_grad_()
    labels = torch.full_like(LABELS, 255)
    everywhere = torch.ones_like(LABELS, dtype=torch.bool)
    value = weighted_loss(ohem, logits, labels, WEIGHTS,
                          ((torch.ones(()), everywhere), ), takes_map=False)
    value.backward()
    assert value == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize('config', [
    dict(type='LovaszLoss', reduction='none'), dict(type='DiceLoss'),
    dict(type='TverskyLoss'), dict(type='OhemCrossEntropy'),
    dict(type='CrossEntropyLoss'),
    dict(type='CrossEntropyLoss', avg_non_ignore=True)])
@pytest.mark.parametrize('case', ['ignored', 'single', 'unsure'])
def test_degenerate_batches_are_finite_with_any_loss(config, case):
    parts = dacs_parts(pseudo_labels=dict(target=dict(
        type='ConfidentFraction',
        threshold=1.0 if case == 'unsure' else 0.3)))
    model = build(tiny_student(loss_decode=config), **parts)
    data = batch()
    for one in data['data_samples']['source']:
        if case != 'unsure':
            one.gt_sem_seg.data.fill_(255 if case == 'ignored' else 2)
    losses = run(model, data)
    value = sum(v for k, v in losses.items() if 'loss' in k)
    assert value.dim() == 0 and torch.isfinite(value)
    value.backward()
    for p in model.segmentor.parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all()


def test_a_loss_that_fails_on_an_unlabelled_image_is_refused():
    with pytest.raises(ValueError, match='images without labels'):
        build(tiny_student(loss_decode=dict(
            type='LovaszLoss', per_image=True, reduction='mean')))


def test_a_head_with_a_loss_of_its_own_runs_once():
    from mmseg.models import FCNHead

    calls = []

    @MODELS.register_module(force=True)
    class OwnLossHead(FCNHead):

        def loss_by_feat(self, seg_logits, batch_data_samples):
            labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
            calls.append(labels)
            logits = torch.nn.functional.interpolate(
                seg_logits, labels.shape[-2:])
            return dict(loss_own=torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=255), acc=torch.zeros(()))

    student = tiny_student()
    student['decode_head']['type'] = 'OwnLossHead'
    model = build(student)
    model.keep_step = True
    losses = run(model, batch())
    assert len(calls) == 2  # once for each view
    assert not any('acc' in key for key in losses)
    view = model.last_step.view('mixed_strong')
    kept = (view.weights > 0) & (view.labels != 255)
    assert torch.equal(calls[1] != 255, kept)
    scale = view.weights[kept].mean()
    output = model.last_step.student('mixed_strong')
    logits = torch.nn.functional.interpolate(
        model.segmentor.decode_head(output.features), (32, 32))
    want = scale * torch.nn.functional.cross_entropy(
        logits, calls[1], ignore_index=255)
    torch.testing.assert_close(losses['mixed.decode.loss_own'], want)


def test_weights_that_cannot_be_folded_are_an_error():
    with pytest.raises(ValueError, match='DiceLoss takes no weight map'):
        weighted_loss(loss(type='DiceLoss'), LOGITS, LABELS, WEIGHTS, None,
                      takes_map=False)


def test_weights_by_sample_need_a_loss_that_takes_them():
    parts = dacs_parts(pseudo_labels=dict(target=dict(
        type='ConfidentFraction', scope='sample', threshold=0.3)))
    run(build(**parts), batch())
    with pytest.raises(ValueError, match="scope = 'sample'"):
        build(tiny_student(loss_decode=dict(type='DiceLoss')), **parts)


def test_pixel_samplers_are_kept():
    """OHEM selects pixels; the view's weights multiply its own."""
    student = tiny_student(sampler=dict(type='OHEMPixelSampler', thresh=0.2,
                                        min_kept=100))
    model = build(student)
    model.keep_step = True
    losses = run(model, batch())
    step = model.last_step
    view, output = step.view('mixed_strong'), step.student('mixed_strong')
    head = model.segmentor.decode_head
    logits = torch.nn.functional.interpolate(
        output.logits, (32, 32), mode='bilinear')
    chosen = head.sampler.sample(logits, view.labels.unsqueeze(1))
    pixel = torch.nn.functional.cross_entropy(
        logits, view.labels, reduction='none', ignore_index=255)
    want = (pixel * chosen.view_as(pixel) * view.weights).mean()
    assert 0 < chosen.mean() < 1
    torch.testing.assert_close(losses['mixed.decode.loss_ce'], want)


def test_one_channel_heads():
    student = tiny_student(
        num_classes=2, out_channels=1, threshold=0.3,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    model = build(student)
    model.keep_step = True
    run(model, batch(num_classes=2))
    probs = model.last_step.teacher('ema', 'target')
    logits = model.teachers['ema'].model.encode_decode(
        model.last_step.view('target').images,
        [dict(img_shape=(32, 32), pad_shape=(32, 32))] * 2)
    assert probs.shape == (2, 2, 32, 32)
    torch.testing.assert_close(probs[:, 1:], logits.sigmoid(), rtol=1e-4,
                               atol=1e-5)


def test_class_edges_are_where_neighbours_differ():
    labels = torch.zeros(1, 5, 6, dtype=torch.long)
    labels[:, :, 3:] = 1
    labels[:, 4] = 255
    want = torch.zeros(5, 6, dtype=torch.long)
    for y in range(5):
        for x in range(6):
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
                    if 0 <= y + dy < 5 and 0 <= x + dx < 6]
            want[y, x] = int(any(
                b < 4 and (a in (2, 3)) for b, a in near))
    assert torch.equal(class_edges(labels)[0], want)


def test_detail_labels_equal_the_stock_head():
    from unittest import mock

    from helpers import sample
    head = MODELS.build(dict(
        type='STDCHead', in_channels=8, channels=8, num_convs=1,
        num_classes=2, in_index=0, concat_input=False,
        loss_decode=dict(type='CrossEntropyLoss')))
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2, 4, 4), generator=gen)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    seen = {}

    def record(self, logits, samples):
        seen['labels'] = torch.cat([s.gt_sem_seg.data for s in samples])
        return {}

    with mock.patch('mmseg.models.decode_heads.fcn_head.FCNHead.loss_by_feat',
                    record):
        head.loss_by_feat(torch.zeros(2, 2, 8, 8),
                          [sample(one) for one in labels])
    got = detail_labels(labels, head.laplacian_kernel, head.fusion_kernel,
                        head.boundary_threshold)
    assert 0 < got.float().mean() < 1
    assert torch.equal(got, seen['labels'])
