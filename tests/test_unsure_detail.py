"""HRDA's detail where the context is unsure: a box for each image."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_cluda import by_hand
from test_hrda import (
    CROP,
    FCN,
    SEGFORMER,
    SIZE,
    at_box,
    config,
    images,
    segmentor,
)
from torch import nn

from helpers import batch, build, dacs_parts, run, tiny_student, total
from mmseg_contrast import ops
from mmseg_contrast.adaptation.heads import MultiScaleHead, Target

BOXES = [(0, 4, 2, 8), (4, 8, 0, 6), (2, 6, 6, 12)]
EACH = ops.BoxOfEach(tuple(BOXES), torch.tensor([2, 0, 2, 1]))
CHOSEN = [BOXES[i] for i in EACH.index]


def draw(*shape, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64)


# Functions of a box of each image


@pytest.mark.parametrize('middle', [(), (3, ), (2, 3)])
@pytest.mark.parametrize('dtype', [
    torch.float64, torch.float16, torch.int64, torch.bool])
def test_crops_of_each_image(middle, dtype):
    maps = (3 * draw(4, *middle, 9, 13)).to(dtype)
    got = ops.crop_to_box(maps, EACH)
    assert got.dtype == dtype and got.shape == (4, *middle, 4, 6)
    for one, image, box in zip(got, maps, CHOSEN, strict=True):
        assert torch.equal(one, ops.crop_to_box(image, box))


def test_boxes_of_each_image_are_scaled_exactly_or_not_at_all():
    half = ops.scale_box(EACH, 2)
    assert half.boxes == ((0, 2, 1, 4), (2, 4, 0, 3), (1, 3, 3, 6))
    assert half.index is EACH.index
    assert ops.box_size(half) == (2, 3) and ops.box_size(EACH) == (4, 6)
    with pytest.raises(ValueError, match='multiples of 4'):
        ops.scale_box(EACH, 4)


def test_parts_on_a_canvas():
    part = draw(4, 3, 4, 6).requires_grad_()
    got = ops.put_on_canvas(part, EACH, (8, 13))
    want = torch.zeros(4, 3, 8, 13, dtype=torch.float64)
    for n, (top, bottom, left, right) in enumerate(CHOSEN):
        want[n, :, top:bottom, left:right] = part.detach()[n]
    assert torch.equal(got, want)
    assert torch.equal(ops.put_on_canvas(part[:1], BOXES[1], (8, 13))[0],
                       F.pad(part[0], (0, 7, 4, 0)))
    grad, = torch.autograd.grad((got * want).sum(), part)
    assert torch.equal(grad, part)
    assert ops.put_on_canvas(part.half(), EACH, (8, 13)).dtype == torch.half


@pytest.mark.parametrize('box', [EACH, BOXES[0], BOXES[2]])
def test_places_in_a_box(box):
    rows, columns = torch.arange(9.) + .5, torch.arange(13.)
    inside = ops.within_box(rows, columns, box)
    down, right = ops.places_in_box(rows, columns, box)
    each = CHOSEN if box is EACH else [box]
    assert inside.shape == ((4, 1, 9, 13) if box is EACH else (1, 9, 13))
    for n, (top, bottom, left, x) in enumerate(each):
        for i, j in itertools.product(range(9), range(13)):
            want = top <= i + .5 < bottom and left <= j < x
            assert inside.view(len(each), 9, 13)[n, i, j] == want
        torch.testing.assert_close(
            down.view(len(each), 9)[n], (rows - top) / (bottom - top))
        torch.testing.assert_close(
            right.view(len(each), 13)[n], (columns - left) / (x - left))


def test_sampling_at_places_of_each_image():
    maps, rows = draw(4, 3, 5, 6), torch.rand(4, 7)
    columns = torch.rand(4, 2)
    got = ops.bilinear_at(maps, rows, columns)
    assert got.shape == (4, 3, 7, 2)
    for n in range(4):
        torch.testing.assert_close(got[n:n + 1], ops.bilinear_at(
            maps[n:n + 1], rows[n], columns[n]))
    # Rows alone may differ from map to map.
    torch.testing.assert_close(
        ops.bilinear_at(maps, rows, columns[0])[0], got[0])


@pytest.mark.parametrize('channels', [1, 3])
def test_fusion_of_each_image(channels):
    context, detail = draw(4, 3, 5, 7), draw(4, 3, 4, 6, seed=1)
    attention = draw(4, channels, 5, 7, seed=2).sigmoid()
    parts = [one.requires_grad_() for one in (context, detail, attention)]
    got = ops.fuse_detail(*parts, EACH)
    want = torch.cat([
        ops.fuse_detail(*(one[n:n + 1] for one in parts), box)
        for n, box in enumerate(CHOSEN)])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    weights = draw(*got.shape, seed=3)
    for a, b in zip(torch.autograd.grad((got * weights).sum(), parts),
                    torch.autograd.grad((want * weights).sum(), parts),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match='do not fill the box'):
        ops.fuse_detail(context, context, attention, EACH)


# Where the net is unsure


def mean_entropy(logits, box):
    """In nats, pixel by pixel."""
    values = []
    for y, x in itertools.product(range(*box[:2]), range(*box[2:])):
        one = [math.exp(v) for v in logits[:, y, x].tolist()]
        values.append(-sum(v / sum(one) * math.log(v / sum(one))
                           for v in one))
    return sum(values) / len(values)


def test_the_box_of_the_highest_entropy():
    logits = 4 * draw(3, 5, 8, 8)
    boxes = ops.slide_boxes(32, 32, (16, 16), (8, 8))
    found = ops.unsure_box(logits, boxes, 4)
    assert found.boxes == tuple(boxes) and len(boxes) == 9
    for n in range(3):
        means = [mean_entropy(logits[n], ops.scale_box(box, 4))
                 for box in boxes]
        assert found.index[n] == means.index(max(means))
    assert len(set(found.index.tolist())) > 1
    # Of equal ones the first.
    assert ops.unsure_box(0 * logits, boxes, 4).index.tolist() == [0] * 3


def test_one_logit_is_that_of_two_classes():
    logits = 4 * draw(3, 1, 8, 8)
    boxes = ops.slide_boxes(8, 8, (4, 4), (2, 2))
    both = torch.cat([torch.zeros_like(logits), logits], 1)
    assert torch.equal(ops.unsure_box(logits, boxes, 1).index,
                       ops.unsure_box(both, boxes, 1).index)


# The student


def unsure(net, x):
    return net.multi_scale(x, detail='unsure')[1]


@pytest.mark.parametrize('head', [FCN, SEGFORMER])
@pytest.mark.parametrize('neck', [None, dict(
    type='FPN', in_channels=[8, 8], out_channels=8, num_outs=2)])
def test_each_image_as_if_alone_at_its_place(head, neck):
    net = segmentor(head=head, neck=neck).train()
    # Norms that don't mix images, so that one alone is the same.
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    x = images(4, seed=3)
    for n, (top, bottom, left, right) in enumerate(net.windows(*SIZE)[::2]):
        if n < 4:  # each has a part that is unlike the rest
            x[n, :, top:bottom, left:right] *= 5
    features = unsure(net, x)
    got = net.decode_head.scales(features)
    boxes = net.windows(*SIZE)
    assert features.box.boxes == tuple(boxes)
    chosen = [boxes[i] for i in features.box.index]
    assert len(set(chosen)) > 1
    for n, box in enumerate(chosen):
        alone = net.decode_head.scales(
            at_box(net, box).extract_feat(x[n:n + 1]))
        means = [mean_entropy(alone.context[0].detach(), ops.scale_box(
            one, 64 // alone.context.shape[-1])) for one in boxes]
        assert means[boxes.index(box)] == max(means)
        for name in ('fused', 'context', 'detail', 'attention',
                     'context_features', 'detail_features'):
            torch.testing.assert_close(
                getattr(got, name)[n:n + 1], getattr(alone, name),
                rtol=1e-5, atol=1e-5)


def test_the_context_is_encoded_and_decoded_once():
    net = segmentor().train()
    count = {name: 0 for name in ('head', 'scale_attention')}
    for name in count:
        getattr(net.decode_head, name).register_forward_hook(
            lambda module, args, out, name=name: count.update(
                {name: count[name] + 1}))
    features = unsure(net, images())
    outputs = net.decode_head.scales(features)
    assert net.backbone.calls == [(2, 3, 32, 32)] * 2
    assert count == dict(head=2, scale_attention=1)
    norm = net.decode_head.head.convs[0].bn
    assert norm.num_batches_tracked == 2
    outputs.fused.square().sum().backward()
    assert all(one.grad is not None for one in net.parameters())


def test_in_evaluation_windows_slide():
    net = segmentor().eval()
    with torch.no_grad():
        features = unsure(net, images())
        assert features.box is None and len(features.windows) == 9
        assert torch.equal(net.decode_head(features), net(images()))


def test_an_unknown_place_is_named():
    with pytest.raises(ValueError, match=r"one of \('random', 'unsure'\), "
                                         "got 'best'"):
        segmentor().train().multi_scale(images(), detail='best')


def test_nothing_asks_for_a_value():
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    net = segmentor().train().to('meta')
    features = unsure(net, images().to('meta'))
    outputs = net.decode_head.scales(features)
    labels = torch.zeros(2, *SIZE, dtype=torch.long, device='meta')
    weights = torch.ones(2, *SIZE, device='meta')
    adapter = MultiScaleHead(segmentor().decode_head, 'decode_head')
    losses = adapter.losses(None, outputs, None, Target(labels, weights))
    sum(losses.values()).backward()
    ops.within_box(torch.arange(3., device='meta'),
                   torch.arange(3., device='meta'), outputs.box)


# In adaptation


def parts(start=0, **objectives):
    found = dacs_parts()
    found['views'].update(
        mixed_strong=dict(type='UnsureDetail', view='mixed_augmented',
                          start=start),
        mixed_augmented=dict(type='StrongAugment', view='mixed'))
    found['objectives'].update(objectives)
    return found


def uda(start=0, **objectives):
    model = build(config(), **parts(start, **objectives))
    model.keep_step = True
    return model


def boxes_of(model):
    """Of each pass of the student."""
    return {name: one.features.boxes for name, one in
            model.last_step.students.items()}


def test_labels_and_weights_of_the_detail_are_those_in_each_box():
    model = uda()
    losses = run(model, batch(SIZE, samples=3))
    step = model.last_step
    view = step.view('mixed_strong')
    assert torch.equal(view.images, step.view('mixed_augmented').images)
    outputs = step.student('mixed_strong')._outputs['decode'][0]
    index = outputs.box.index.tolist()
    boxes = [outputs.box.boxes[i] for i in index]
    want = torch.stack([F.cross_entropy(
        F.interpolate(outputs.detail[n:n + 1], CROP, mode='bilinear'),
        ops.crop_to_box(view.labels[n:n + 1], box), ignore_index=255,
        reduction='none') * ops.crop_to_box(view.weights[n:n + 1], box)
        for n, box in enumerate(boxes)]).mean()
    torch.testing.assert_close(
        losses['mixed.decode.hr.loss_ce'], 0.1 * want)
    assert view.weights.min() < 1
    total(losses).backward()
    assert all(one.grad is not None for one in model.segmentor.parameters())
    # The source has one place for the batch.
    assert len(boxes_of(model)['source']) == 1


def test_losses_that_need_masks():
    """Weights folded into labels are cut to each box too."""
    model = build(config(head=dict(FCN, loss_decode=dict(
        type='DiceLoss', loss_name='loss_dice'))), **parts())
    losses = run(model, batch(SIZE))
    assert losses['mixed.decode.hr.loss_dice'] > 0
    total(losses).backward()


def test_half_precision_is_close():
    found = []
    for enabled in (False, True):
        model = uda(cluda=dict(type='ResolutionContrast', size=4))
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses = run(model, batch(SIZE))
        total(losses).backward()
        found.append([losses[key].item() for key in (
            'mixed.decode.loss_ce', 'mixed.decode.hr.loss_ce',
            'cluda.loss_mixed_strong')])
    assert found[0] == pytest.approx(found[1], rel=3e-2)


def test_it_begins_at_its_start():
    model = uda(start=1)
    run(model, batch(SIZE))
    (box, ) = boxes_of(model)['mixed_strong']
    assert all(isinstance(edge, int) for edge in box)
    run(model, batch(SIZE))
    assert isinstance(boxes_of(model)['mixed_strong'], ops.BoxOfEach)


@pytest.mark.parametrize('samples', [1, 2, 3])
def test_cludas_loss_by_hand(samples):
    model = uda(cluda=dict(type='ResolutionContrast', size=4))
    with torch.no_grad():  # not alike everywhere
        model.objectives['cluda'].weighter.weight.normal_(std=2)
    losses = run(model, batch(SIZE, samples))
    index = boxes_of(model)['mixed_strong'].index
    found = losses['cluda.loss_mixed_strong']
    assert found.item() == pytest.approx(
        by_hand(model, 'mixed_strong', 4).item(), rel=2e-5)
    total(losses).backward()
    if samples == 3:
        assert len(set(index.tolist())) > 1


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='model.views.mixed_strong = Unsure'
                                         '.*EncoderDecoder has none'):
        build(tiny_student(), **parts())
    with pytest.raises(ValueError, match='mixed_strong.start must be at '
                                         'least 0, got -1'):
        build(config(), **parts(start=-1))
