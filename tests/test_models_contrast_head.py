"""ContrastHead by itself: projection, labels, schedule, supervision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from helpers import CLASSES, batch, tiny_student
from mmseg_contrast import ops
from mmseg_contrast.models import Projection
from mmseg_contrast.models.classifier_input import classifier_input


def head_config(**changes):
    """A small ContrastHead on the tiny backbone's second output."""
    config = dict(
        type='ContrastHead', in_channels=8, in_index=1, channels=4,
        num_classes=CLASSES, projection=dict(layers=1),
        bank=dict(type='PrototypeBank'), tau=0.5)
    config.update(changes)
    return config


def segmentor(kind='EncoderDecoder', seed=0, **changes):
    torch.manual_seed(seed)
    config = tiny_student()
    config.update(type=kind, auxiliary_head=head_config(**changes))
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


def supervised(model, data=None):
    """Losses of one supervised iteration."""
    data = copy.deepcopy(data or batch())
    data = dict(inputs=data['inputs']['source'],
                data_samples=data['data_samples']['source'])
    return model(**model.data_preprocessor(data, True), mode='loss')


def test_a_projection_is_its_layers():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 3)
    one = Projection(6, 4, layers=2, hidden_channels=5, last_act=True)
    first, second = one.layers
    want = F.relu(F.batch_norm(
        F.conv2d(x, first.conv.weight), None, None, training=True))
    want = F.relu(F.batch_norm(
        F.conv2d(want, second.conv.weight), None, None, training=True))
    assert torch.allclose(one(x), want, atol=1e-6)
    assert (one(x) >= 0).all()
    plain = Projection(6, 4, layers=2, norm_cfg=None)
    first, second = plain.layers
    want = F.conv2d(F.relu(F.conv2d(x, first.conv.weight, first.conv.bias)),
                    second.conv.weight, second.conv.bias)
    assert torch.allclose(plain(x), want, atol=1e-6)
    wide = Projection(6, 4, layers=2, kernel_size=3)
    assert wide.layers[0].conv.kernel_size == (3, 3)
    assert wide.layers[1].conv.kernel_size == (1, 1)
    assert wide(x).shape == (2, 4, 3, 3)
    assert torch.equal(Projection(6, 6, layers=0)(x), x)


@pytest.mark.parametrize('change, message', [
    (dict(layers=-1), 'layers'), (dict(kernel_size=2), 'kernel_size'),
    (dict(layers=0), 'channels = 4')])
def test_mistakes_of_a_projection_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Projection(6, 4, **change)


def test_embeddings_have_length_1():
    head = MODELS.build(head_config()).train()
    maps = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)]
    found = head.project(maps)
    assert found.shape == (2, 4, 3, 3)
    assert torch.allclose(found.norm(dim=1), torch.ones(2, 3, 3))
    raw = MODELS.build(head_config(normalize='anchors'))
    raw.load_state_dict(head.state_dict())
    raw.train()
    assert not torch.allclose(raw.project(maps).norm(dim=1),
                              torch.ones(2, 3, 3), atol=0.1)
    assert torch.allclose(F.normalize(raw.project(maps), dim=1), found)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert head.project(maps).dtype == torch.float32


def test_several_outputs_are_stacked():
    head = MODELS.build(head_config(
        in_channels=[8, 8], in_index=[0, 1], channels=16,
        input_transform='resize_concat', projection=dict(layers=0),
        normalize='none'))
    maps = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)]
    want = torch.cat([maps[0], F.interpolate(
        maps[1], (6, 6), mode='bilinear', align_corners=False)], 1)
    assert torch.equal(head.project(maps), want)


def test_it_is_a_legal_auxiliary_head():
    model = segmentor()
    losses = supervised(model)
    assert set(losses) == {'decode.loss_ce', 'decode.acc_seg',
                           'aux.loss_contrast'}
    value = losses['aux.loss_contrast']
    value.backward()
    assert model.backbone.layers[0][0].weight.grad.abs().sum() > 0
    assert model.auxiliary_head.projection.layers[0].conv.weight.grad.abs(
        ).sum() > 0
    assert model.decode_head.conv_seg.weight.grad is None


def test_the_loss_is_that_of_labels_and_bank():
    data = batch()
    model = segmentor(update='after', loss_weight=0.3)
    supervised(model, data)  # fills the bank
    bank = copy.deepcopy(model.auxiliary_head.bank)
    inputs = model.data_preprocessor(dict(
        inputs=data['inputs']['source'],
        data_samples=data['data_samples']['source']), True)
    vectors = model.auxiliary_head.project(
        model.extract_feat(inputs['inputs'])).permute(0, 2, 3, 1)
    labels = torch.cat([one.gt_sem_seg.data for one in
                        data['data_samples']['source']])[:, ::4, ::4]
    known = labels != 255
    want = 0.3 * F.cross_entropy(
        vectors[known] @ bank.mean[:, 0].T / 0.5, labels[known])
    found = supervised(model, data)['aux.loss_contrast']
    assert found.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_bank_is_updated_before_or_after_the_loss():
    data = batch()
    # An empty bank knows no class: nothing to tell an anchor from.
    assert supervised(segmentor(update='after'), data)[
        'aux.loss_contrast'].item() == 0
    assert supervised(segmentor(update='before'), data)[
        'aux.loss_contrast'].item() > 0.1
    model = segmentor(update='after')
    supervised(model, data)
    assert (model.auxiliary_head.bank.count > 0).all()


def test_the_weight_starts_and_rises():
    head = MODELS.build(head_config(loss_weight=2., start=3, ramp=4))
    assert [head.weight_at(i) for i in range(9)] == [
        0, 0, 0, 0, .5, 1, 1.5, 2, 2]
    head = MODELS.build(head_config(start=2))
    assert [head.weight_at(i) for i in range(4)] == [0, 0, 1, 1]
    model = segmentor(start=2)
    losses = [supervised(model)['aux.loss_contrast'] for _ in range(3)]
    assert [value.item() > 0 for value in losses] == [False, False, True]
    # Nothing is skipped: all ranks have the same gradients, if of 0.
    assert losses[0].requires_grad
    assert (model.auxiliary_head.bank.count > 0).all()


def test_the_schedule_goes_on_after_resume():
    model = segmentor(start=2)
    for _ in range(2):
        supervised(model)
    other = segmentor(start=2, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.auxiliary_head.bank.mean,
                       model.auxiliary_head.bank.mean)
    found, want = supervised(other), supervised(model)
    assert found['aux.loss_contrast'] == want['aux.loss_contrast'] > 0


def test_other_weights_are_the_same_without_it():
    torch.manual_seed(0)
    plain = MODELS.build(tiny_student())
    plain.init_weights()
    mine = segmentor().state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize('kind', ['FCNHead', 'DAHead'])
def test_what_a_head_classifies_can_be_seen(kind):
    torch.manual_seed(0)
    config = dict(tiny_student(dropout=0.5)['decode_head'], type=kind)
    if kind == 'DAHead':
        del config['num_convs'], config['concat_input']
        config['pam_channels'] = 4
    head = MODELS.build(config).eval()
    features = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 3, 3)]
    with classifier_input(head) as seen:
        output = head(features)
    assert torch.equal(head.conv_seg(seen.features), seen.logits)
    if kind == 'FCNHead':
        assert torch.equal(seen.logits, output)
    # Nothing is kept outside of the block, and a copy sees its own.
    head(features)
    for part in (head.dropout, head.conv_seg):
        assert not {'seen_input', 'seen_output'} & set(vars(part))
    with classifier_input(copy.deepcopy(head)) as other:
        head(features)
    assert other.features is None and other.logits is None
    assert len(head.conv_seg._forward_hooks) == 1
    # Before dropout: what is dropped differs, what is seen doesn't.
    head.train()
    for norm in head.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    with classifier_input(head) as again:
        head(features)
    assert torch.equal(again.features, seen.features)


def test_supervised_contrast_of_the_decoder():
    model = segmentor('ContrastEncoderDecoder', features='decoder')
    losses = supervised(model)
    losses['aux.loss_contrast'].backward()
    assert model.decode_head.convs[0].conv.weight.grad.abs().sum() > 0
    assert model.decode_head.conv_seg.weight.grad is None
    plain = segmentor()
    plain.load_state_dict(model.state_dict())
    model = segmentor('ContrastEncoderDecoder')
    model.load_state_dict(plain.state_dict())
    one, two = supervised(model), supervised(plain)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_several_contrast_heads_of_one_decoder():
    torch.manual_seed(0)
    config = tiny_student()
    config.update(type='ContrastEncoderDecoder', auxiliary_head=[
        head_config(), head_config(
            features='logits', in_channels=CLASSES, in_index=-1,
            channels=CLASSES, projection=dict(layers=0)),
        dict(config['decode_head'], in_index=0)])
    losses = supervised(MODELS.build(config).train())
    assert {'aux_0.loss_contrast', 'aux_1.loss_contrast',
            'aux_2.loss_ce'} < set(losses)


@pytest.mark.parametrize('change', [
    dict(features='decoder'), dict(correct_only=True),
    dict(sampler=dict(type='HardEasy'))])
def test_what_a_plain_segmentor_cannot_give_is_named(change):
    with pytest.raises(ValueError, match='ContrastEncoderDecoder'):
        supervised(segmentor(**change))


def test_only_correct_pixels_count():
    data = batch()
    model = segmentor('ContrastEncoderDecoder', correct_only=True)
    inputs = model.data_preprocessor(dict(
        inputs=copy.deepcopy(data['inputs']['source']),
        data_samples=copy.deepcopy(data['data_samples']['source'])), True)
    logits = model._forward(inputs['inputs'])
    labels = torch.cat([one.gt_sem_seg.data for one in
                        data['data_samples']['source']])[:, ::4, ::4]
    right = (logits.argmax(1) == labels).sum()
    supervised(model, data)
    assert model.auxiliary_head.bank.count.sum() == right > 0


@pytest.mark.parametrize('change, message', [
    (dict(features='neck'), 'features'), (dict(tau=0), 'tau'),
    (dict(own='both'), 'own'), (dict(update='never'), 'update'),
    (dict(normalize=True), 'normalize'), (dict(start=-1), 'start'),
    (dict(in_channels=[8, 8]), 'in_channels and in_index'),
    (dict(input_transform='resize_concat'), 'in_channels and in_index')])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(head_config(**change))


def test_places_are_images_and_tiles():
    from mmseg_contrast.models.contrast_head import _places
    labels = torch.zeros(2, 5, 7, dtype=torch.int64)
    found = _places(labels, torch.arange(70), 3)
    at = torch.arange(70).view(2, 5, 7)
    assert torch.equal(found['images'].view(2, 5, 7),
                       torch.arange(2).view(2, 1, 1).expand(2, 5, 7))
    blocks = found['blocks'].view(2, 5, 7)
    for i, y, x in ((0, 0, 0), (0, 4, 6), (1, 2, 3)):
        assert blocks[i, y, x] == (i * 2 + y // 3) * 3 + x // 3
    assert len(blocks.unique()) == 12 and at.numel() == 70


def test_the_regularizer_joins_the_loss():
    data = batch()
    values = []
    for weight in (0., 1.):
        model = segmentor(regularizer=weight)
        values.append(supervised(model, data)['aux.loss_contrast'])
    model = segmentor(regularizer=1.)
    model.auxiliary_head.keep_anchors = True
    supervised(model, data)
    (last, ) = model.auxiliary_head.last
    mean, present = model.auxiliary_head.bank.centres()
    want = ops.contrast_regularizer(
        last['anchors'], last['labels'], mean, 0.5, present)
    assert (values[1] - values[0]).item() == pytest.approx(
        want.item(), rel=1e-4)
