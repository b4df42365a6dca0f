"""The feature distance: its value, and where its backbone is not."""

import copy
import inspect

import pytest
import torch

from helpers import CLASSES, batch, build, dacs_parts, run, tiny_student, total
from mmseg_contrast.adaptation import FeatureDistance
from mmseg_contrast.adaptation.objectives.feature_distance import is_pretrained

THINGS = (1, 3)


def parts(**options):
    """DACS with the feature distance."""
    made = dacs_parts()
    made['objectives']['fd'] = dict(
        type='FeatureDistance', classes=THINGS, weight=0.02, **options)
    return made


def frozen(model, scale=1.3):
    """Another backbone, as if pretrained."""
    encoder = copy.deepcopy(model.segmentor.backbone)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(scale)
    model.objectives['fd'].freeze(encoder)
    return encoder


def pretrained_student(path):
    """A stock backbone whose weights come from a file."""
    from mmseg.models.backbones import MobileNetV2
    torch.manual_seed(7)
    torch.save(MobileNetV2(widen_factor=0.1).state_dict(), path)
    return tiny_student() | dict(
        backbone=dict(
            type='MobileNetV2', widen_factor=0.1,
            init_cfg=dict(type='Pretrained', checkpoint=str(path))),
        decode_head=dict(
            type='FCNHead', in_channels=32, in_index=3, channels=8,
            num_convs=1, concat_input=False, num_classes=CLASSES,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss')))


def test_value_against_a_loop():
    model = build(**parts())
    model.keep_step = True
    encoder = frozen(model)
    losses = run(model, batch())
    step = model.last_step
    view = step.view('source')
    mine = step.student('source').backbone_features[-1]
    its = encoder(view.images)[-1]
    distances = []
    for n in range(2):
        for i in range(8):
            for j in range(8):
                cell = view.labels[n, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
                if any((cell == c).float().mean() >= 0.75 for c in THINGS):
                    distances.append((mine[n, :, i, j]
                                      - its[n, :, i, j]).norm())
    assert 0 < len(distances) < 128
    wanted = 0.02 * sum(distances) / len(distances)
    torch.testing.assert_close(losses['fd.loss_feature_distance'], wanted)
    torch.testing.assert_close(
        losses['source.thing_ratio'], torch.tensor(len(distances) / 128))
    # Gradients reach the student's backbone, and only that.
    losses['fd.loss_feature_distance'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for p in model.backbone.parameters())
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is None for p in model.decode_head.parameters())


def test_nothing_to_compare_is_zero_and_not_nan():
    model = build(**parts())
    frozen(model)
    data = batch()
    for one in data['data_samples']['source']:
        one.gt_sem_seg.data.fill_(0)
    losses = run(model, data)
    assert losses['fd.loss_feature_distance'] == 0
    losses['fd.loss_feature_distance'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0
               for p in model.backbone.parameters())


def test_the_frozen_backbone_is_nobodys_part_and_never_moves():
    model = build(**parts())
    encoder = frozen(model)
    hidden = {id(p) for p in encoder.parameters()}
    assert not hidden & {id(p) for p in model.parameters()}
    assert not any('encoder' in key or key.startswith('objectives')
                   for key in model.state_dict())
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        total(run(model.train(), batch())).backward()
        optimizer.step()
    assert not encoder.training
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    # It follows the model's device and type nevertheless.
    model.double()
    assert next(encoder.parameters()).dtype is torch.float64
    assert model.objectives['fd'].encoder is encoder


def test_pretrained_weights_are_read_once(tmp_path, monkeypatch):
    path = tmp_path / 'imagenet.pth'
    model = build(segmentor=pretrained_student(path), **parts())
    assert model.objectives['fd'].encoder is None
    reads = []
    load = torch.load

    def counted(file, *args, **kwargs):
        reads.append(str(file))
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, 'load', counted)
    model.init_weights()
    assert reads == [str(path)]
    # The ImageNet weights, of which the student's training changes nothing.
    wanted = load(path)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
    for key, value in model.objectives['fd'].encoder.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    assert model.objectives['fd'].encoder.conv1.bn.training is False


def test_random_features_are_refused():
    model = build(**parts())
    with pytest.raises(ValueError, match='model.segmentor.backbone has none'):
        model.init_weights()
    model = build(**parts(encoder=dict(type='TinyBackbone')))
    with pytest.raises(ValueError, match='encoder has none'):
        model.init_weights()
    with pytest.raises(ValueError, match='init_weights'):
        run(build(**parts()), batch())


def test_another_encoder(tmp_path):
    path = tmp_path / 'other.pth'
    other = pretrained_student(path)['backbone']
    model = build(**parts(encoder=other))
    model.init_weights()
    encoder = model.objectives['fd'].encoder
    assert torch.equal(encoder.state_dict()['conv1.conv.weight'],
                       torch.load(path)['conv1.conv.weight'])
    # Its features are not like the student's.
    with pytest.raises(ValueError, match=r"like the student's, \(2, 8"):
        run(model.train(), batch())


def test_a_second_initialisation_keeps_the_first_copy(tmp_path):
    model = build(segmentor=pretrained_student(tmp_path / 'a.pth'), **parts())
    model.init_weights()
    encoder = model.objectives['fd'].encoder
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
    model.init_weights()
    assert model.objectives['fd'].encoder is encoder


@pytest.mark.parametrize(('options', 'sentence'), [
    (dict(classes=(1, CLASSES)), 'ids 0 to 4'),
    (dict(classes=()), 'model.objectives.fd.classes'),
    (dict(classes=6), 'got 6'),
    (dict(classes=('car', )), 'car'),
    (dict(stage='last'), 'model.objectives.fd.stage'),
    (dict(min_ratio='much'), 'min_ratio'),
    (dict(min_ratio=1.5), 'min_ratio')])
def test_wrong_options(options, sentence):
    made = dacs_parts()
    made['objectives']['fd'] = dict(
        dict(type='FeatureDistance', classes=THINGS), **options)
    with pytest.raises(ValueError, match=sentence):
        build(**made)


def test_a_stage_that_is_not_there():
    model = build(**parts(stage=2))
    frozen(model)
    with pytest.raises(ValueError, match='2 outputs'):
        run(model, batch())


def test_published_defaults():
    options = inspect.signature(FeatureDistance).parameters
    assert options['weight'].default == 0.005
    assert options['classes'].default == (6, 7, *range(11, 19))
    assert options['min_ratio'].default == 0.75
    assert options['stage'].default == -1


def test_crops_must_fit_the_stride():
    model = build(segmentor=tiny_student(size=(30, 32)), **parts())
    frozen(model)
    with pytest.raises(ValueError, match='crop_size'):
        run(model, batch(size=(30, 32)))


def test_is_pretrained():
    class Backbone:
        init_cfg = None
        pretrained = None

    one = Backbone()
    assert not is_pretrained(one)
    one.init_cfg = dict(type='Normal', layer='Conv2d')
    assert not is_pretrained(one)
    one.init_cfg = [dict(type='Kaiming'),
                    dict(type='Pretrained', checkpoint='a.pth')]
    assert is_pretrained(one)
    one.init_cfg, one.pretrained = None, 'open-mmlab://resnet50_v1c'
    assert is_pretrained(one)
