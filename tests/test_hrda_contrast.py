"""What HRDA classifies, for contrast heads and for hooks that look at it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from test_hrda import SIZE, at_box, config, images, samples, segmentor

from helpers import CLASSES, batch, build, dacs_parts, run, tiny_student, total
from mmseg_contrast.engine.hooks import (
    ContrastHealthHook,
    FeatureSpaceHook,
    PrototypeInitHook,
)
from mmseg_contrast.engine.hooks.feature_space import Batch, embed
from mmseg_contrast.engine.looking import glance, untouched
from mmseg_contrast.models.classifier_input import classifier_input


def head_config(**options):
    return dict(dict(
        type='ContrastHead', in_channels=8, num_classes=CLASSES, channels=4,
        bank=dict(type='PrototypeBank')), **options)


BY_FEATURES = {
    'backbone': head_config(in_index=1),
    'decoder': head_config(features='decoder'),
    'logits': head_config(features='logits', in_channels=CLASSES)}


@pytest.mark.parametrize('training', [True, False])
def test_what_is_classified_is_the_context(training):
    net = segmentor().train(training)
    features = net.extract_feat(images())
    with classifier_input(net.decode_head) as seen:
        assert seen.features is seen.logits is None
        outputs = net.decode_head.scales(features)
    assert seen.features is outputs.context_features is not None
    assert seen.logits is outputs.fused
    torch.testing.assert_close(
        net.decode_head.head.conv_seg(seen.features), outputs.context)
    # Once the block has ended, nobody looks any more.
    assert net.decode_head.watchers == []
    before = seen.logits
    net.decode_head.scales(features)
    assert seen.logits is before


def test_a_look_that_fails_leaves_nothing():
    net = segmentor()
    with pytest.raises(KeyError), classifier_input(net.decode_head):
        raise KeyError
    assert net.decode_head.watchers == []
    copy.deepcopy(net)


# Supervised training


@pytest.mark.parametrize('features', BY_FEATURES)
def test_supervised_contrast(features):
    """One segmentor for both: HRDA with a head that asks for the decoder."""
    net = at_box(segmentor(auxiliary_head=copy.deepcopy(
        BY_FEATURES[features])), (8, 40, 16, 48)).train()
    twin = copy.deepcopy(net)
    x, truth = images(), samples()
    losses = net.loss(x, truth)
    at_box(twin, (8, 40, 16, 48))
    stages = twin.extract_feat(x)
    outputs = twin.decode_head.scales(stages)
    given = dict(backbone=stages, decoder=[outputs.context_features],
                 logits=[outputs.fused])[features]
    head = twin.auxiliary_head
    embeddings = head.project(given)
    # The context's resolution, a quarter of half; logits have the detail's.
    side = 16 if features == 'logits' else 8
    assert embeddings.shape == (2, 4, side, side)
    want = head.loss(given if features == 'backbone' else stages, truth,
                     decoder=outputs.context_features, logits=outputs.fused)
    assert want['loss_contrast'] > 0
    torch.testing.assert_close(
        losses['aux.loss_contrast'], want['loss_contrast'])
    plain = at_box(segmentor(), (8, 40, 16, 48)).train()
    stock = plain.loss(x, truth)
    assert set(losses) == {*stock, 'aux.loss_contrast'}
    for key, value in stock.items():
        assert torch.equal(losses[key], value), key
    total(losses).backward()
    assert all(one.grad is not None for one in net.parameters())


def test_hard_anchors_see_the_fused_logits():
    net = segmentor(auxiliary_head=head_config(
        in_index=1, bank=dict(type='BatchBank'),
        sampler=dict(type='HardEasy', max_samples=64, max_views=8))).train()
    losses = net.loss(images(), samples())
    assert losses['aux.loss_contrast'] > 0


def test_the_other_segmentor_is_refused_in_one_sentence():
    plain = config(auxiliary_head=head_config(features='decoder'))
    plain.pop('detail_size')
    net = MODELS.build(dict(plain, type='ContrastEncoderDecoder')).train()
    with pytest.raises(ValueError, match="decodes two resolutions: set .* to "
                                         "'HRDASegmentor'") as error:
        net.loss(images(), samples())
    assert len(str(error.value).splitlines()) == 1


# Adaptation


def adapting(**head):
    parts = dacs_parts()
    parts['objectives']['contrast'] = dict(
        type='Contrast', bank_from='teacher')
    model = build(config(auxiliary_head=head_config(**head)), **parts)
    model.keep_step = True
    return model


@pytest.mark.parametrize('features', BY_FEATURES)
def test_contrast_in_adaptation(features):
    model = adapting(**BY_FEATURES[features])
    losses = run(model, batch(SIZE))
    assert losses['contrast.loss_source'] > 0
    student = model.last_step.students['source']
    side = 16 if features == 'logits' else 8
    assert student.embed('aux').shape == (2, 4, side, side)
    # The teacher, which has windows, embeds the same places.
    taught = model.last_step.passes['ema', 'source'].embed('aux')
    assert taught.shape == (2, 4, side, side)
    total(losses).backward()
    assert all(one.grad is not None for one in model.segmentor.parameters())


def test_a_segmentor_of_supervised_contrast_can_be_adapted():
    """Its own loss is the stock one, but for the contrast heads."""
    found = []
    for kind in ('EncoderDecoder', 'ContrastEncoderDecoder'):
        student = dict(tiny_student(), type=kind,
                       auxiliary_head=head_config(in_index=1))
        parts = dacs_parts()
        parts['objectives']['contrast'] = dict(type='Contrast')
        found.append(run(build(student, **parts), batch()))
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key
    assert found[0]['contrast.loss_source'] > 0


# Hooks


@pytest.mark.parametrize('features', [None, *BY_FEATURES])
def test_embeddings_of_the_feature_space(features):
    net = segmentor(auxiliary_head=copy.deepcopy(
        BY_FEATURES[features or 'backbone']))
    head = net.auxiliary_head if features else None
    labels = torch.randint(0, CLASSES, (2, *SIZE))
    with untouched(net):
        cloud = embed(net, head, Batch('x', images(), labels, 'labels'),
                      9999, CLASSES, 0)
        stages = net.extract_feat(images())
        outputs = net.decode_head.scales(stages)
        maps = stages[-1] if head is None else head.project(dict(
            backbone=stages, decoder=[outputs.context_features],
            logits=[outputs.fused])[features])
    small = F.interpolate(labels[:, None].float(), maps.shape[2:])
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    distances = ((cloud.vectors[:, None] - rows)**2).sum(2)
    assert (distances.min(1) < 1e-9).all()
    assert len(cloud.vectors) == len(rows)
    assert np.array_equal(np.bincount(cloud.labels),
                          np.bincount(small.long().flatten().numpy()))


def test_labels_that_are_predicted():
    net = segmentor()
    with untouched(net):
        seen = glance(net, images(), True)
        logits = net(images())
    assert seen.probabilities.shape == (2, CLASSES, *SIZE)
    want = F.interpolate(logits, SIZE, mode='bilinear').softmax(1)
    torch.testing.assert_close(seen.probabilities, want)
    torch.testing.assert_close(seen.logits, logits)


class Runner(SimpleNamespace):
    """As much of a runner as these hooks ask for."""

    def __init__(self, model, folder):
        shown = {}
        super().__init__(
            model=model, iter=0, work_dir=str(folder), seed=0,
            train_dataloader=SimpleNamespace(dataset=SimpleNamespace(
                metainfo=dict(classes=[str(c) for c in range(CLASSES)]))),
            visualizer=SimpleNamespace(
                shown=shown, add_scalars=lambda d, step: shown.update(d),
                add_image=lambda name, image, step: shown.update(
                    {name: image})),
            message_hub=SimpleNamespace(update_scalar=lambda k, v: None))


@pytest.mark.parametrize('features', ['backbone', 'decoder'])
def test_the_hooks_of_a_run(features, tmp_path):
    model = adapting(**BY_FEATURES[features])
    runner = Runner(model, tmp_path)
    hooks = [ContrastHealthHook(interval=1, report_interval=1),
             FeatureSpaceHook(interval=1, pixels=100)]
    for hook in hooks:
        hook.before_train(runner)
    # What comes first is not counted: the bank was empty.
    for runner.iter in range(2):
        for hook in hooks:
            hook.before_train_iter(runner, runner.iter)
        run(model, batch(SIZE, seed=runner.iter))
        for hook in hooks:
            hook.after_train_iter(runner, runner.iter)
    shown = runner.visualizer.shown
    assert -1 <= shown['contrast/aux_positive_cosine'] <= 1
    assert np.ptp(shown['feature_space']) > 0
    assert len(list(tmp_path.rglob('iter_*.png'))) == 2


@pytest.mark.parametrize('features', ['backbone', 'decoder'])
def test_a_bank_is_filled_before_training(features, tmp_path, monkeypatch):
    model = adapting(**BY_FEATURES[features])
    bank = model.segmentor.auxiliary_head.bank
    hook = PrototypeInitHook(correct_only=False)
    one = batch(SIZE)
    monkeypatch.setattr(hook, '_loader', lambda runner: ([one], 2, 0))
    monkeypatch.setattr(hook, '_as_streams', lambda runner, data: data)
    runner = Runner(model, tmp_path)
    hook.before_train(runner)
    labels = torch.cat([each.gt_sem_seg.data for each in
                        one['data_samples']['source']])
    small = F.interpolate(labels[:, None].float(), (8, 8))
    want = torch.bincount(small[small < CLASSES].long(), minlength=CLASSES)
    assert torch.equal(bank.count.flatten(), want)


def test_heads_that_cannot_be_seen_say_so():
    """A head that doesn't end with mmseg's cls_seg, inside HRDA too."""
    net = segmentor(auxiliary_head=head_config(features='decoder'))
    del net.decode_head.head.conv_seg
    net.decode_head.head.cls_seg = lambda maps: maps[:, :CLASSES]
    with pytest.raises(ValueError, match="the decode head doesn't end|ends "
                                         "with mmseg's cls_seg"):
        net.train().loss(images(), samples())
    with untouched(net), pytest.raises(ValueError, match="doesn't end with"):
        glance(net, images(), True).embed(net.auxiliary_head)
