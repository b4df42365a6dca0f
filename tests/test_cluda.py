"""CLUDA: contrast of pixels at two resolutions, op and objective."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS
from test_hrda import SEGFORMER, SIZE, at_box, config

from helpers import CLASSES, batch, build, dacs_parts, run, tiny_student, total
from mmseg_contrast import ops
from mmseg_contrast.adaptation import View

# The op


def explicit(f, labels, g=None, w=None, p=None, tau=1.):
    """The equation, pixel by pixel; plain numbers."""
    number = len(labels)
    f = F.normalize(f, dim=1)
    g = None if g is None else F.normalize(g, dim=1)
    p = torch.ones(number) if p is None else p

    def term(i, j, keys):
        near = (f[i] @ keys[j] / tau).exp()
        apart = sum((f[i] @ keys[n] / tau).exp() for n in range(number)
                    if labels[n] not in (255, int(labels[i])))
        return -(near / (near + apart)).log()

    each = []
    for i in range(number):
        others = [j for j in range(number)
                  if j != i and labels[j] == labels[i] != 255]
        if not others:
            continue
        value = 0.
        for j in others:
            if g is None:
                value += p[i] * p[j] * term(i, j, f)
                continue
            both = w[i] * w[j]
            value += .5 * p[i] * p[j] * (
                both * term(i, j, f) + (1 - both) * term(i, j, g))
        each.append(value / len(others))
    return sum(each) / len(each)


def pixels(number=24, seed=0):
    gen = torch.Generator().manual_seed(seed)
    f, g = torch.randn(2, number, 5, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, 3, (number, ), generator=gen)
    labels[::7] = 255
    labels[1] = 3  # without a positive
    w, p = torch.rand(2, number, generator=gen, dtype=torch.float64)
    return [one.requires_grad_() if one.is_floating_point() else one
            for one in (f, labels, g, w, p)]


@pytest.mark.parametrize('chunk', [None, 5])
@pytest.mark.parametrize('used, tau', [('', 1.), ('p', .5), ('gw', 1.),
                                       ('gwp', .5)])
def test_the_op_is_the_equation_with_its_gradients(used, tau, chunk):
    f, labels, *rest = pixels()
    given = [one if name in used else None
             for name, one in zip('gwp', rest, strict=True)]
    found = ops.resolution_contrast(f, labels, *given, tau=tau,
                                    chunk_size=chunk)
    want = explicit(f, labels, *given, tau=tau)
    assert found.item() == pytest.approx(want.item(), rel=1e-12)
    leaves = [one for one in (f, *given) if one is not None]
    for a, b in zip(torch.autograd.grad(found, leaves),
                    torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.abs().max() > 1e-4


def test_an_attention_of_1_is_half_the_context_and_of_0_half_the_detail():
    f, labels, g, _, p = pixels()
    one = torch.ones_like(p)
    plain = ops.resolution_contrast(f, labels, weights=p)
    both = ops.resolution_contrast(f, labels, g, one, p)
    assert both.item() == pytest.approx(plain.item() / 2, rel=1e-12)
    # The same pixels at both resolutions: any attention, the same loss.
    for w in (one, torch.linspace(0, 1, len(f), dtype=torch.float64)):
        same = ops.resolution_contrast(f, labels, f, w, p)
        assert same.item() == pytest.approx(plain.item() / 2, rel=1e-12)
    grad, = torch.autograd.grad(
        ops.resolution_contrast(f, labels, g, 0 * one, p), g)
    assert grad.abs().max() > 1e-4


def test_ignored_pixels_are_neither_anchors_nor_keys():
    f, labels, g, w, p = pixels()
    loss = ops.resolution_contrast(f, labels, g, w, p)
    ignored = labels == 255
    for grad in torch.autograd.grad(loss, (f, g, w, p)):
        assert not grad[ignored].any() and grad[~ignored].any()
    kept = [one[~ignored] for one in (f, labels, g, w, p)]
    assert ops.resolution_contrast(*kept).item() == pytest.approx(
        loss.item(), rel=1e-12)


def test_nothing_labelled_is_0_of_the_graph():
    f, labels, g, w, p = pixels()
    loss = ops.resolution_contrast(f, torch.full_like(labels, 255), g, w, p)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (f, g, w, p)):
        assert not grad.any()


def test_detail_and_attention_belong_together():
    f, labels, g, w, _ = pixels()
    for one in (dict(detail=g), dict(attention=w)):
        with pytest.raises(ValueError, match='together'):
            ops.resolution_contrast(f, labels, **one)


# Sampling


@pytest.mark.parametrize('size', [(3, 5), (8, 12), (11, 30)])
def test_at_the_centres_it_is_torchs_resizing(size):
    maps = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    rows, columns = (ops.centres(number, 1) for number in size)
    found = ops.bilinear_at(maps, rows, columns)
    want = F.interpolate(maps, size, mode='bilinear', align_corners=False)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_places_outside_have_the_value_of_the_border():
    maps = torch.arange(4.).view(1, 1, 1, 4)
    found = ops.bilinear_at(
        maps, torch.tensor([-3., .5, 9.]),
        torch.tensor([-1., 0., .25, .5, 1., 2.]))
    assert found.shape == (1, 1, 3, 6)
    assert found[0, 0].tolist() == [[0., 0., .5, 1.5, 3., 3.]] * 3


# The objective


def model_with(hrda=True, objective=None, seed=0, **kwargs):
    parts = dacs_parts()
    if objective is not False:
        parts['objectives']['cluda'] = dict(
            type='ResolutionContrast', **(objective or {}))
    model = build(config(**kwargs) if hrda else tiny_student(
        size=SIZE, **kwargs), seed=seed, **parts)
    model.keep_step = True
    return model


def data(samples=2, seed=0):
    return batch(size=SIZE, samples=samples, seed=seed)


def by_hand(model, view, size):
    """The loss of a view, from maps, place by place."""
    view, maps = model.last_step.view(view), model.last_step.student(
        view).resolutions
    # Rows and columns of the grid, 64 pixels each.
    step = SIZE[0] // size
    context = F.interpolate(maps[0][0], (size, size), mode='bilinear',
                            align_corners=False)
    fine, box = maps[1] if len(maps) > 1 else (None, None)
    if fine is not None:
        height, width = ops.box_size(box)
        fine = F.interpolate(fine, (height // step, width // step),
                             mode='bilinear', align_corners=False)
    f, g, w, p, labels = [], [], [], [], []
    for image in range(len(view.images)):
        if fine is not None:
            top, bottom, left, right = box.boxes[box.index[image]] if (
                isinstance(box, ops.BoxOfEach)) else box
        for i in range(size):
            for j in range(size):
                here = context[image, :, i, j]
                y, x = i * step + step // 2, j * step + step // 2
                f.append(here)
                labels.append(view.labels[image, y, x])
                p.append(1. if view.weights is None
                         else view.weights[image, y, x])
                if fine is None:
                    continue
                # Boxes of these tests are whole cells of the grid.
                inside = top <= y < bottom and left <= x < right
                g.append(fine[image, :, (y - top) // step,
                              (x - left) // step] if inside else here)
                conv = model.objectives['cluda'].weighter
                score = (conv.weight[0, :, 0, 0] * here).sum() + conv.bias[0]
                w.append(inside * score.sigmoid())
    labels, p = torch.stack(labels), torch.tensor(p)
    labels = torch.where(p > 0, labels, 255)
    if fine is None:
        return explicit(torch.stack(f), labels, p=p)
    return explicit(torch.stack(f), labels, torch.stack(g), torch.stack(w), p)


@pytest.mark.parametrize('samples', [1, 2, 3])
@pytest.mark.parametrize('hrda', [True, False])
def test_the_loss_of_each_view_by_hand(hrda, samples):
    model = model_with(hrda, dict(size=4))
    if hrda:
        at_box(model.segmentor, (16, 48, 32, 64))
        with torch.no_grad():  # not alike everywhere
            model.objectives['cluda'].weighter.weight.normal_(std=2)
    losses = run(model, data(samples))
    for view in ('source', 'mixed_strong'):
        found = losses[f'cluda.loss_{view}']
        want = by_hand(model, view, 4)
        assert found.item() == pytest.approx(want.item(), rel=2e-5)
        assert .1 < found.item() < 10
    weights = model.last_step.view('mixed_strong').weights
    assert weights.min() < 1


def test_gradients_reach_both_resolutions_the_weighter_and_the_backbone():
    model = model_with(objective=dict(size=8))
    losses = run(model, data())
    model.zero_grad()
    step = model.last_step
    (low, _), (high, box) = step.student('source').resolutions
    assert box is not None and low.shape[-2:] == high.shape[-2:] == (8, 8)
    weighter = model.objectives['cluda'].weighter
    leaves = [low, high, weighter.weight, weighter.bias,
              model.segmentor.backbone.convs[0].weight]
    for grad in torch.autograd.grad(losses['cluda.loss_source'], leaves):
        assert grad.abs().max() > 1e-7


def optimizer_step(model, optimizer, one):
    losses = run(model, one)
    optimizer.zero_grad()
    total(losses).backward()
    optimizer.step()
    return losses


def train(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return [optimizer_step(model, optimizer, data(seed=i))
            for i in range(steps)]


@pytest.mark.parametrize('hrda', [True, False])
@pytest.mark.parametrize('off', [dict(weight=0.), dict(start=9)])
def test_weight_0_or_a_late_start_changes_nothing(hrda, off):
    plain, mine = model_with(hrda, False), model_with(
        hrda, dict(size=4, **off))
    for want, found in zip(train(plain), train(mine), strict=True):
        for key, value in want.items():
            assert torch.equal(found[key], value), key
        assert found['cluda.loss_source'] == 0
    theirs = mine.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(theirs[key], value), key


@pytest.mark.parametrize('start', [0, 9])
def test_every_parameter_has_a_gradient(start):
    model = model_with(objective=dict(size=4, start=start))
    total(run(model, data())).backward()
    assert [name for name, one in model.named_parameters()
            if one.requires_grad and one.grad is None] == []


def test_the_weighter_is_trained_and_saved():
    model = model_with(objective=dict(size=4))
    losses = train(model)
    weighter = model.objectives['cluda'].weighter
    assert weighter.weight.abs().min() > 1e-3
    assert losses[0]['source.context_attention'] == .5
    state = model.state_dict()
    assert torch.equal(state['objectives.cluda.weighter.weight'],
                       weighter.weight)
    again = model_with(objective=dict(size=4), seed=1)
    again.load_state_dict(state)
    assert torch.equal(again.objectives['cluda'].weighter.weight,
                       weighter.weight)
    # Inference needs none of it.
    assert not any('weighter' in key for key in state
                   if key.startswith('teachers'))


def test_the_optimizer_of_the_configs_has_the_weighter():
    model = model_with()
    wrapper = build_optim_wrapper(model, dict(
        constructor='UDAOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=6e-5),
        paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.)))))
    mine = {id(one) for one in model.objectives['cluda'].parameters()}
    rates = [group['lr'] for group in wrapper.optimizer.param_groups
             for one in group['params'] if id(one) in mine]
    assert rates == [6e-5, 6e-5]


def test_nothing_asks_for_a_value(monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    objective = model_with().objectives['cluda'].to('meta')
    low, high = (torch.randn(2, 8, 8, 8, device='meta', requires_grad=True)
                 for _ in range(2))
    weights = torch.ones(2, *SIZE, device='meta')
    view = View('source', torch.zeros(2, 3, *SIZE, device='meta'), 'source',
                torch.zeros(2, *SIZE, dtype=torch.long, device='meta'),
                weights=weights, weight_parts=((weights[0, 0, 0],
                                                weights > 0), ))
    student = SimpleNamespace(
        resolutions=[(low, None), (high, (8, 40, 16, 48))])
    losses = objective(SimpleNamespace(
        view=lambda name: view, student=lambda name: student, iteration=0,
        log=lambda key, value: None))
    sum(losses.values()).backward()
    assert low.grad.shape == high.grad.shape == (2, 8, 8, 8)
    assert objective.weighter.weight.grad is not None


def test_one_resolution_has_no_weighter():
    model = model_with(hrda=False)
    assert not list(model.objectives['cluda'].parameters())


def test_margins_are_ignored():
    model = model_with(hrda=False, objective=dict(size=16))
    losses = run(model, data())
    step = model.last_step
    view = step.view('mixed_strong')
    objective = model.objectives['cluda']
    hidden = torch.zeros_like(view.labels, dtype=torch.bool)
    hidden[:, :16] = True
    step.views['mixed_strong'] = view.replace(
        weights=view.weights.where(~hidden, 0.), weight_parts=tuple(
            (scale, mask & ~hidden) for scale, mask in view.weight_parts))
    weighed = objective(step)['loss_mixed_strong']
    step.views['mixed_strong'] = view.replace(
        labels=view.labels.where(~hidden, 255))
    labelled = objective(step)['loss_mixed_strong']
    assert weighed.item() == pytest.approx(labelled.item(), rel=1e-6)
    assert weighed.item() != losses['cluda.loss_mixed_strong'].item()


def test_ids_of_no_class_are_ignored():
    model = model_with(objective=dict(size=8))
    run(model, data())
    step, found = model.last_step, []
    view = step.view('source')
    left = torch.arange(SIZE[1]) < 24
    for unknown in (255, CLASSES):
        step.views['source'] = view.replace(
            labels=view.labels.masked_fill(left, unknown))
        found.append(model.objectives['cluda'](step)['loss_source'].item())
    assert found[0] == found[1] > 0


def test_class_0_inside_and_outside_is_class_0():
    """The published code takes label 0 for a place outside of the box."""
    model = at_boxed(model_with(objective=dict(size=4)))
    one = data()
    for sample in one['data_samples']['source']:
        labels = sample.gt_sem_seg.data
        labels[...] = 0
        labels[..., :32] = 1
    losses = run(model, one)
    want = by_hand(model, 'source', 4)
    assert losses['cluda.loss_source'].item() == pytest.approx(
        want.item(), rel=2e-5)
    step = model.last_step
    (_, _), (high, _) = step.student('source').resolutions
    grad, = torch.autograd.grad(losses['cluda.loss_source'], high)
    # Four places of the grid, each between four cells of the detail.
    assert (grad.abs().amax((0, 1)) > 0).sum() == 16


def at_boxed(model):
    at_box(model.segmentor, (16, 48, 32, 64))
    return model


def test_half_precision_is_close():
    losses = [], []
    for enabled, found in zip((False, True), losses, strict=True):
        model = at_boxed(model_with(objective=dict(size=8)))
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            value = run(model, data())['cluda.loss_source']
        assert value.dtype == torch.float32
        found.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert math.isfinite(losses[1][0])


@pytest.mark.parametrize('changes, message', [
    (dict(views='source'), 'views must be a list'),
    (dict(views=[]), 'views must be a list'),
    (dict(weight=-1.), 'weight must be at least 0'),
    (dict(size=0), 'size must be at least 1'),
    (dict(start=-1), 'start must be at least 0'),
    (dict(tau=0.), 'tau must be above 0')])
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match='model.objectives.cluda.' + message):
        model_with(objective=changes)


def test_a_view_without_labels_is_named():
    model = model_with(objective=dict(views=['target']))
    with pytest.raises(ValueError, match="view 'target' needs labels"):
        run(model, data())


def test_a_size_above_the_maps_takes_the_maps():
    model = model_with(objective=dict(size=65))
    losses = run(model, data())
    assert CLASSES == 5 and losses['cluda.loss_source'] > 0
    small = model_with(objective=dict(size=8))
    assert run(small, data())['cluda.loss_source'].item() == pytest.approx(
        losses['cluda.loss_source'].item(), rel=1e-6)


# A head that weighs


SMALL = dict(channels=4, embed_dims=4)


def by_a_head(objective=None, **kwargs):
    return model_with(objective=dict(
        dict(size=4, weighter=dict(SMALL)), **(objective or {})), **kwargs)


def test_the_published_weighter_is_segformers_decoder_with_one_logit():
    model = model_with(objective=dict(size=4, weighter=dict()))
    head = model.objectives['cluda'].weighter['head']
    assert (head.channels, head.out_channels) == (256, 1)
    assert head.in_index == [1]  # the stages of this decode head
    assert type(head.fuse_layer).__name__ == 'ConvFusion'
    assert head.fuse_layer.conv.kernel_size == (1, 1)
    published = MODELS.build(config(head=SEGFORMER, attention=dict()))
    assert [one.proj.out_features for one in published.decode_head.companion(
        {}).embed_layers.values()] == [256, 256]
    own = model_with(objective=dict(weighter=dict(
        type='FCNHead', channels=4, num_convs=1)))
    assert type(own.objectives['cluda'].weighter['head']).__name__ == (
        'FCNHead')


def test_what_a_head_weighs_is_the_context():
    model = at_boxed(by_a_head())
    losses = run(model, data())
    step, objective = model.last_step, model.objectives['cluda']
    head = objective.weighter['head']
    student = step.student('source')
    maps = head(student.features.context)
    assert maps.shape == (2, 1, 8, 8)
    scores = F.interpolate(maps, (4, 4), mode='bilinear').sigmoid()
    torch.testing.assert_close(
        step.logs['source.context_attention'],
        scores[:, :, 1:3, 2:].mean().detach())  # of the box
    assert scores.std() > 0
    # The loss of such scores, by hand.
    twin = at_boxed(model_with(objective=dict(size=4)))
    run(twin, data())
    twin.objectives['cluda'].weighter = None
    twin.objectives['cluda']._scores = lambda *_: F.interpolate(
        maps, (4, 4), mode='bilinear')
    want = twin.objectives['cluda'](twin.last_step)['loss_source']
    assert losses['cluda.loss_source'].item() == pytest.approx(
        want.item(), rel=1e-5)
    grads = torch.autograd.grad(
        losses['cluda.loss_source'],
        [head.conv_seg.weight, model.segmentor.backbone.convs[0].weight])
    assert all(grad.abs().max() > 1e-7 for grad in grads)


@pytest.mark.parametrize('off', [dict(weight=0.), dict(start=9)])
def test_a_head_of_no_weight_changes_nothing(off):
    plain, mine = model_with(objective=False), by_a_head(off)
    for want, found in zip(train(plain), train(mine), strict=True):
        for key, value in want.items():
            assert torch.equal(found[key], value), key
    theirs = mine.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(theirs[key], value), key


@pytest.mark.parametrize('start', [0, 9])
def test_every_parameter_of_a_head_has_a_gradient(start):
    model = by_a_head(dict(start=start))
    total(run(model, data())).backward()
    assert [name for name, one in model.named_parameters()
            if one.requires_grad and one.grad is None] == []


def test_dropout_of_a_head_is_a_function_of_position():
    found = []
    for seed in (1, 2, None):
        model = by_a_head(dict(weighter=dict(
            SMALL, dropout_ratio=0. if seed is None else .5)))
        torch.manual_seed(seed or 0)
        state = torch.get_rng_state()
        found.append(run(model, data())['cluda.loss_source'].item())
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != found[2]


def test_weights_of_a_head_are_drawn_apart():
    models, after = [], []
    for options in (dict(size=4, weighter=dict(SMALL)), dict(size=4), False):
        models.append(model_with(objective=options))
        after.append(torch.rand(3))
    # Whatever is built next draws the same.
    assert torch.equal(after[0], after[2]) and torch.equal(*after[1:])
    del models[1]
    for model in models:
        torch.manual_seed(5)
        model.init_weights()
    mine, plain = (model.state_dict() for model in models)
    for key, value in plain.items():
        assert torch.equal(mine[key], value), key
    head = models[0].objectives['cluda'].weighter['head']
    assert 0 < head.conv_seg.weight.std() < .05


def test_a_head_learns_as_fast_as_heads():
    """Published, it is a part of the decode head."""
    model = by_a_head()
    wrapper = build_optim_wrapper(model, dict(
        constructor='UDAOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=6e-5, weight_decay=.01),
        paramwise_cfg=dict(custom_keys=dict(
            head=dict(lr_mult=10.), norm=dict(decay_mult=0.)))))
    mine = {id(one) for one in model.objectives['cluda'].parameters()}
    settings = {(round(group['lr'], 9), group['weight_decay'])
                for group in wrapper.optimizer.param_groups
                for one in group['params'] if id(one) in mine}
    assert settings == {(6e-4, .01)}


def test_one_resolution_has_nothing_to_weigh():
    with pytest.raises(ValueError, match='cluda.weighter shares pixels .* '
                                         'EncoderDecoder has one'):
        model_with(hrda=False, objective=dict(weighter=dict()))
