"""Sliding windows in batches give what mmseg's single ones give."""

import copy
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from torch import nn

from helpers import batch, build, dacs_parts, sample, tiny_student
from mmseg_contrast import ops
from mmseg_contrast.models import (
    BatchedSlide,
    UDATTAModel,
    batched_slide,
    windows_per_pass,
)

STOCK_SLIDE = EncoderDecoder.slide_inference
SEGFORMER = dict(type='SegformerHead', in_channels=[8, 8], in_index=[0, 1],
                 channels=8, num_convs=None, concat_input=None)


def slide_cfg(crop=(16, 16), stride=(8, 8), **more):
    return dict(mode='slide', crop_size=crop, stride=stride, **more)


def decisive(model):
    """Weights and statistics with which windows differ visibly."""
    torch.manual_seed(1)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, .1)
                part.running_var.uniform_(.5, 2)
    return model.eval()


def plain(test_cfg, kind='EncoderDecoder', **head):
    """A stock segmentor, as Runner builds it."""
    cfg = tiny_student(**head)
    if head.get('type') == 'SegformerHead':
        for key in ('num_convs', 'concat_input'):
            del cfg['decode_head'][key]
    cfg.update(type=kind, test_cfg=test_cfg)
    return decisive(MODELS.build(ConfigDict(cfg)))


def cascade(test_cfg):
    cfg = tiny_student()
    first = cfg['decode_head']
    cfg.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[
        first, dict(type='OCRHead', in_channels=8, in_index=1, channels=8,
                    ocr_channels=4, num_classes=5, norm_cfg=dict(type='BN'),
                    dropout_ratio=0, align_corners=False,
                    loss_decode=dict(type='CrossEntropyLoss'))],
        test_cfg=test_cfg)
    return decisive(MODELS.build(ConfigDict(cfg)))


def metas(number, size):
    return [dict(img_shape=size, ori_shape=size, pad_shape=size,
                 padding_size=[0] * 4, number=i) for i in range(number)]


def images(number, size):
    return torch.randn(number, 3, *size,
                       generator=torch.Generator().manual_seed(0))


class Passes:
    """Records the shape of what the backbone gets."""

    def __init__(self, model):
        self.shapes = []
        self.handle = model.backbone.register_forward_pre_hook(
            lambda module, args: self.shapes.append(tuple(args[0].shape)))

    @property
    def counts(self):
        return [shape[0] for shape in self.shapes]


def both(model, inputs, data=None):
    """Logits of mmseg's loop and of ours."""
    number, _, *size = inputs.shape
    with torch.no_grad():
        want = model.inference(inputs, data or metas(number, tuple(size)))
        with batched_slide(model):
            got = model.inference(inputs, data or metas(number, tuple(size)))
    return want, got


def assert_same(want, got):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert want.std() > .1  # the comparison means something
    assert (got - want).abs().max() < 1e-5


# The pure function


def explicit(forward, inputs, boxes):
    """One window of one image after the other, pixel sums in float64."""
    number, _, height, width = inputs.shape
    total = torch.zeros(number, 2, height, width, dtype=torch.float64)
    count = torch.zeros(height, width)
    for top, bottom, left, right in boxes:
        for i in range(number):
            window = inputs[i:i + 1, :, top:bottom, left:right]
            total[i, :, top:bottom, left:right] += forward(window, [i])[0]
        count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize('number, size, crop, stride, limit, passes', [
    (1, (16, 16), (8, 8), (4, 4), 4, [3, 3, 3]),  # 9 windows, not 4, 4, 1
    (1, (16, 16), (8, 8), (4, 4), 9, [9]),
    (1, (16, 16), (8, 8), (4, 4), 100, [9]),
    (1, (13, 10), (8, 6), (3, 4), 2, [2, 2, 2]),  # moved back inside
    (2, (8, 12), (8, 8), (8, 2), 4, [4, 2]),  # 3 windows of 2 images
    (3, (8, 12), (8, 8), (8, 4), 5, [3, 3]),
    (3, (8, 12), (8, 8), (8, 4), 2, [2, 2, 2]),  # 2 images, then 1
    (3, (8, 12), (8, 8), (8, 4), 1, [1] * 6),
    (2, (5, 12), (8, 8), (4, 4), 8, [4]),  # smaller than the window
    (2, (5, 6), (8, 8), (4, 4), 8, [2])])
def test_slide_windows_against_a_loop(number, size, crop, stride, limit,
                                      passes):
    counts = []

    def forward(windows, of):
        # depends on the pixel, on the rest of the window and on the image
        mean = windows.mean((1, 2, 3), keepdim=True)
        shift = torch.tensor(of, dtype=windows.dtype).view(-1, 1, 1, 1)
        counts.append(len(windows))
        assert len(of) == len(windows)
        return torch.cat([windows[:, :1] * mean, windows[:, 1:2] + shift], 1)

    inputs = images(number, size)
    boxes = ops.slide_boxes(*size, crop, stride)
    got = ops.slide_windows(forward, inputs, boxes, limit)
    assert counts == passes
    assert max(counts) <= limit
    want = explicit(forward, inputs, boxes)
    assert (got - want).abs().max() < 1e-6
    assert got.dtype == torch.float32


def test_slide_windows_is_merge_windows_in_parts():
    inputs = images(2, (12, 12))
    boxes = ops.slide_boxes(12, 12, (8, 8), (2, 4))
    windows = torch.stack([ops.crop_to_box(inputs, box) for box in boxes])
    merged = ops.merge_windows(windows.square(), boxes, (12, 12))
    for limit in (1, 3, 50):
        assert torch.equal(merged, ops.slide_windows(
            lambda some, of: some.square(), inputs, boxes, limit))
    assert (merged - inputs.square()).abs().max() < 1e-6


def test_half_precision_is_added_up_in_float32():
    boxes = ops.slide_boxes(8, 64, (8, 32), (8, 1))
    got = ops.slide_windows(
        lambda some, of: some.to(torch.bfloat16), torch.full(
            (1, 3, 8, 64), 1 / 3), boxes, 4)
    third = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
    assert got.dtype == torch.float32
    # 32 windows lie on one pixel; a sum in bfloat16 is 0.4 % off
    assert (got - third).abs().max() < 1e-6
    double = ops.slide_windows(lambda some, of: some.double(),
                               images(1, (8, 64)), boxes, 4)
    assert double.dtype == torch.float64


# Equal to mmseg


@pytest.mark.parametrize('number, size, crop, stride', [
    (1, (32, 64), (32, 32), (16, 16)),
    (2, (32, 64), (32, 32), (32, 32)),
    (2, (37, 50), (16, 24), (11, 13)),
    (3, (24, 40), (32, 16), (8, 8)),
    (2, (20, 24), (32, 32), (16, 16))])
@pytest.mark.parametrize('limit', [1, 4, 64])
def test_equal_to_stock(number, size, crop, stride, limit):
    model = plain(slide_cfg(crop, stride, batched=limit))
    assert_same(*both(model, images(number, size)))


@pytest.mark.parametrize('head', [
    dict(), SEGFORMER, dict(num_classes=2, out_channels=1, threshold=.3),
    dict(SEGFORMER, num_classes=2, out_channels=1)],
    ids=['fcn', 'segformer', 'fcn-1', 'segformer-1'])
@pytest.mark.parametrize('align_corners', [False, True])
def test_equal_to_stock_for_other_heads(head, align_corners):
    if 'out_channels' in head:
        head = dict(head, loss_decode=dict(type='CrossEntropyLoss',
                                           use_sigmoid=True))
    model = plain(slide_cfg((24, 16), (10, 12), batched=5), **head,
                  align_corners=align_corners)
    want, got = both(model, images(2, (40, 44)))
    assert want.shape[1] == (1 if 'out_channels' in head else 5)
    assert_same(want, got)


def test_equal_to_stock_for_a_cascade():
    model = cascade(slide_cfg((24, 24), (12, 16), batched=4))
    assert isinstance(model, CascadeEncoderDecoder)
    # the second stage looks at the whole window
    seen = Passes(model)
    assert_same(*both(model, images(2, (48, 56))))
    assert seen.counts[-5:] == [4, 4, 4, 4, 2]


def test_equal_to_stock_in_predict():
    """Padding, flips and the original size are the stock predict's."""
    model = plain(slide_cfg((16, 16), (12, 12), batched=3))

    def samples():
        done = [sample(size=(30, 28)) for _ in range(2)]
        for one in done:
            one.set_metainfo(dict(ori_shape=(50, 40), flip=True,
                                  flip_direction='horizontal',
                                  padding_size=[0, 4, 0, 2]))
        return done

    with torch.no_grad():
        want = model.predict(images(2, (32, 32)), samples())
        alone = model.predict(images(2, (32, 32)))
        with batched_slide(model):
            got = model.predict(images(2, (32, 32)), samples())
            without = model.predict(images(2, (32, 32)))
    for a, b in zip(want + alone, got + without, strict=True):
        assert_same(a.seg_logits.data, b.seg_logits.data)
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)
        assert a.metainfo == b.metainfo
    assert got[0].seg_logits.data.shape == (5, 50, 40)


def test_windows_in_the_backbone():
    model = plain(slide_cfg((16, 16), (8, 8), batched=4))
    seen = Passes(model)
    both(model, images(2, (24, 40)))
    # 2 rows of 4 windows: stock takes each by itself, for both images
    assert seen.shapes[:8] == [(2, 3, 16, 16)] * 8
    assert seen.shapes[8:] == [(4, 3, 16, 16)] * 4
    model.test_cfg.batched = 1
    seen.shapes.clear()
    both(model, images(2, (24, 40)))
    assert seen.counts == [2] * 8 + [1] * 16


def test_whole_images_stay_whole():
    model = plain(dict(mode='whole', batched=2))
    seen = Passes(model)
    want, got = both(model, images(3, (24, 40)))
    assert torch.equal(want, got) and seen.counts == [3, 3]


# Metas


@MODELS.register_module(force=True)
class MetaSegmentor(EncoderDecoder):
    """Writes down the metas of each pass; images answer by their number."""

    def encode_decode(self, inputs, batch_img_metas):
        self.__dict__.setdefault('seen', []).append(
            copy.deepcopy(batch_img_metas))
        logits = super().encode_decode(inputs, batch_img_metas)
        batch_img_metas[0]['img_shape'] = 'changed'
        return logits + torch.tensor(
            [float(one['number']) for one in batch_img_metas]
        ).view(-1, 1, 1, 1)


def test_each_window_has_its_images_metas():
    model = plain(slide_cfg((16, 16), (8, 16), batched=4),
                  kind='MetaSegmentor')
    data = metas(3, (32, 20))
    data[0]['batch_input_shape'] = (32, 20)
    before = copy.deepcopy(data)
    with torch.no_grad(), batched_slide(model):
        got = model.inference(images(3, (32, 20)), data)
    assert data == before  # mmseg writes the window's size into them
    assert [[one['number'] for one in few] for few in model.seen] == (
        [[0, 1, 2]] * 6)
    for few in model.seen:
        for one in few:
            for key in ('img_shape', 'pad_shape', 'batch_input_shape'):
                assert isinstance(one[key], torch.Size)
                assert one[key] == (16, 16)
            assert one['ori_shape'] == (32, 20)
    with torch.no_grad():
        assert_same(model.inference(images(3, (32, 20)), data), got)


def test_windows_smaller_than_the_crop_say_so():
    model = plain(slide_cfg((16, 64), (8, 32), batched=4),
                  kind='MetaSegmentor')
    with torch.no_grad(), batched_slide(model):
        model.inference(images(1, (32, 20)), metas(1, (32, 20)))
    assert [[one['img_shape'] for one in few] for few in model.seen] == [
        [(16, 20)] * 3]


# What the block leaves


def test_the_model_is_as_before():
    model = plain(slide_cfg(batched=4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = set(vars(model))
    with pytest.raises(KeyError), batched_slide(model):
        with batched_slide(model):
            assert 'slide_inference' in vars(model)
        # an inner block ends nothing that an outer one began
        assert 'slide_inference' in vars(model)
        assert list(model.state_dict()) == list(before)
        raise KeyError
    assert set(vars(model)) == names
    assert type(model) is EncoderDecoder
    assert EncoderDecoder.slide_inference is STOCK_SLIDE
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert type(pickle.loads(pickle.dumps(model))) is EncoderDecoder


def test_a_copy_slides_with_itself():
    model = plain(slide_cfg(batched=4))
    with torch.no_grad(), batched_slide(model):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        mine, theirs = Passes(model), Passes(twin)
        data = metas(1, (32, 32))
        got = twin.inference(images(1, (32, 32)), data)
    assert mine.counts == [] and theirs.counts == [3, 3, 3]
    with torch.no_grad():
        assert (got - model.inference(images(1, (32, 32)), data)
                ).abs().max() > 1


def test_only_who_asks_for_it():
    model = plain(slide_cfg())
    with batched_slide(model):
        assert 'slide_inference' not in vars(model)
    with batched_slide(dict(type='EncoderDecoder')):  # not built yet
        pass

    class Own(EncoderDecoder):
        def slide_inference(self, inputs, batch_img_metas):
            return 'own'

    model = plain(slide_cfg(batched=4), kind=Own)
    with batched_slide(model):
        assert model.inference(
            images(1, (8, 8)), metas(1, (8, 8))) == 'own'


# Everywhere


@MODELS.register_module(force=True)
class SlidingSegmentor(BatchedSlide, EncoderDecoder):
    """A class of our own."""


@pytest.mark.parametrize('kind', ['SlidingSegmentor',
                                  'ContrastEncoderDecoder'])
def test_mixin(kind):
    stock = plain(slide_cfg())
    model = plain(slide_cfg(batched=4), kind=kind)
    assert list(model.state_dict()) == list(stock.state_dict())
    seen = Passes(model)
    data = metas(1, (32, 32))
    with torch.no_grad():
        want = stock.inference(images(1, (32, 32)), data)
        assert_same(want, model.inference(images(1, (32, 32)), data))
        assert seen.counts == [3] * 3
        del model.test_cfg['batched']
        assert torch.equal(want, model.inference(images(1, (32, 32)), data))
    assert seen.counts == [3] * 3 + [1] * 9


@pytest.mark.parametrize('who', ['student', 'teacher', 'both'])
@pytest.mark.parametrize('kind', ['EncoderDecoder', 'SlidingSegmentor'])
def test_adapted_student_and_teacher(who, kind):
    student = dict(tiny_student(), type=kind,
                   test_cfg=slide_cfg((16, 16), (8, 8), batched=5))
    model = decisive(build(student, **dacs_parts(predict_with=who)))
    teacher = model.teachers['ema'].model
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    keys = list(model.state_dict())
    data = batch()
    passes = dict(student=Passes(model.segmentor), teacher=Passes(teacher))

    def test(net):
        return net.test_step(dict(
            inputs=data['inputs']['source'],
            data_samples=copy.deepcopy(data['data_samples']['source'])))

    got = test(model)
    asked = ['student', 'teacher'] if who == 'both' else [who]
    for name, seen in passes.items():
        # 9 windows of 2 images, at most 5 at a time
        assert seen.counts == ([4, 4, 4, 4, 2] if name in asked else [])
        seen.handle.remove()
    for name, net in (('teacher', teacher), ('student', model.segmentor)):
        assert 'slide_inference' not in vars(net)
        del net.test_cfg['batched']
        if name not in asked:
            continue
        prefix = 'teacher_' if (name, who) == ('teacher', 'both') else ''
        for mine, theirs in zip(got, test(net), strict=True):
            assert_same(theirs.seg_logits.data,
                        mine.get(f'{prefix}seg_logits').data)
            assert torch.equal(theirs.pred_sem_seg.data,
                               mine.get(f'{prefix}pred_sem_seg').data)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize('adapted', [False, True])
def test_test_time_augmentation(adapted):
    cfg = slide_cfg(batched=3)
    net = (build(dict(tiny_student(), test_cfg=cfg),
                 **dacs_parts(predict_with='both'))
           if adapted else plain(cfg))
    decisive(net)
    model = UDATTAModel(net)
    data = batch()

    def copies():
        done = []
        for flip in (False, True):
            few = copy.deepcopy(data['data_samples']['source'])
            for one in few:
                one.set_metainfo(dict(flip=flip, flip_direction='horizontal'))
            done.append(few)
        return dict(inputs=[data['inputs']['source']] * 2, data_samples=done)

    inner = getattr(net, 'segmentor', net)
    seen = Passes(inner)
    with torch.no_grad(), batched_slide(model):
        got = model.test_step(copies())
    assert seen.counts == [2] * 18  # 9 windows of 2 images, twice
    inner.test_cfg.batched = 6
    with torch.no_grad(), batched_slide(model):
        got = model.test_step(copies())
    assert seen.counts[18:] == [6] * 6
    assert 'slide_inference' not in vars(inner)
    inner.test_cfg.batched = None
    if adapted:
        net.teachers['ema'].model.test_cfg.batched = None
    with torch.no_grad():
        want = model.test_step(copies())
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)
        assert ('teacher_pred_sem_seg' in b) == adapted


# Mistakes


@pytest.mark.parametrize('changes, words', [
    (dict(batched=0), r'batched must be .* got 0\.'),
    (dict(batched=True), r'batched must be .* got True\.'),
    (dict(batched=2.), r'batched must be .* got 2\.0\.'),
    (dict(batched='all'), r"batched must be .* got 'all'\."),
    (dict(crop_size=None), r'crop_size must be .* got None\.'),
    (dict(stride=8), r'stride must be .* got 8\.'),
    (dict(stride=(8, 0)), r'stride must be .* got \(8, 0\)\.'),
    (dict(stride=(8, 17)), r'stride = \(8, 17\) is larger than crop_size = '
                           r'\(16, 16\)')])
def test_wrong_settings(changes, words):
    cfg = slide_cfg(batched=4) | changes
    with pytest.raises(ValueError, match=r'^model\.segmentor\.test_cfg\.'
                       + words):
        build(dict(tiny_student(), test_cfg=cfg), **dacs_parts())
    model = plain(cfg)
    with pytest.raises(ValueError, match=r'^model\.test_cfg\.' + words):
        with batched_slide(model):
            pass


def test_settings_that_are_none_of_ours():
    # mmseg's own way is not checked by us, nor is a window that isn't used
    for cfg in (None, {}, slide_cfg(stride=(99, 99)), slide_cfg(batched=None)):
        assert windows_per_pass(cfg) is None
    assert windows_per_pass(dict(mode='whole', batched=3)) == 3
    assert windows_per_pass(slide_cfg([16, 16], [16, 8], batched=3)) == 3


def test_labels_are_generated_from_batches_of_windows(monkeypatch):
    """tools/generate_pseudo_labels.py, with a plain segmentor."""
    path = Path(__file__).parent.parent / 'tools/generate_pseudo_labels.py'
    spec = importlib.util.spec_from_file_location('generate', path)
    generate = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'generate', generate)
    spec.loader.exec_module(generate)
    model, found = plain(slide_cfg()), []
    seen = Passes(model)
    for batched in (None, 5):
        model.test_cfg.batched = batched
        with torch.no_grad():
            found.append(generate.probabilities(model, dict(
                inputs=[images(1, (32, 32))[0] * 50],
                data_samples=[sample(size=(32, 32))])))
    assert seen.counts == [1] * 9 + [5, 4]
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert found[0].std() > .01
