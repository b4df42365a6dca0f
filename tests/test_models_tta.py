"""Test-time augmentation of student and teacher."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_contrast.models.tta import UDATTAModel


class Segmentor(nn.Module):
    """Logits are read off the image; a flipped copy is flipped back."""

    def __init__(self, channels, teacher, threshold=0.3):
        super().__init__()
        self.out_channels = channels
        self.decode_head = SimpleNamespace(threshold=threshold)
        self.teacher = teacher

    def test_step(self, data):
        done = []
        for image, sample in zip(
                data['inputs'], data['data_samples'], strict=True):
            logits = image[:self.out_channels]
            if sample.flip:
                logits = logits.flip(2)
            sample = sample.new()
            sample.set_data(dict(
                seg_logits=PixelData(data=logits),
                pred_sem_seg=PixelData(data=logits.argmax(0))))
            if self.teacher:
                sample.set_data(dict(
                    teacher_seg_logits=PixelData(data=-2 * logits),
                    teacher_pred_sem_seg=PixelData(data=logits.argmin(0))))
            done.append(sample)
        return done


class Wrapper(nn.Module):
    """Where UDASegmentor keeps its student."""

    def __init__(self, segmentor):
        super().__init__()
        self.segmentor = segmentor
        self.test_step = segmentor.test_step


def batch(channels, copies=3):
    """Two images, each in `copies` versions, the second one flipped."""
    rng = torch.Generator().manual_seed(0)
    inputs, all_samples = [], []
    for copy in range(copies):
        images, samples = [], []
        for number in range(2):
            images.append(torch.randn(channels, 5, 6, generator=rng))
            sample = SegDataSample(metainfo=dict(
                flip=copy == 1, img_path=f'{number}.png'))
            sample.gt_sem_seg = PixelData(data=torch.full(
                (1, 5, 6), number))
            samples.append(sample)
        inputs.append(images)
        all_samples.append(samples)
    return dict(inputs=inputs, data_samples=all_samples)


def upright(data, number):
    return [image[number].flip(2) if copy == 1 else image[number]
            for copy, image in enumerate(data['inputs'])]


@pytest.mark.parametrize('wrapped', [False, True])
def test_mean_of_softmaxes(wrapped):
    segmentor = Segmentor(4, teacher=True)
    model = UDATTAModel(Wrapper(segmentor) if wrapped else segmentor)
    data = batch(4)
    merged = model.test_step(data)
    assert len(merged) == 2
    for number, sample in enumerate(merged):
        logits = upright(data, number)
        for field, factor in (('pred_sem_seg', 1),
                              ('teacher_pred_sem_seg', -2)):
            mean = sum((factor * one).softmax(0) for one in logits) / 3
            got = sample.get(field).data
            assert got.shape == (1, 5, 6)
            assert torch.equal(got[0], mean.argmax(0))
        assert sample.img_path == f'{number}.png'
        assert (sample.gt_sem_seg.data == number).all()
    # the augmented copies disagree, so that the mean matters
    assert not torch.equal(logits[0].argmax(0), mean.argmax(0))


@pytest.mark.parametrize('channels', [1, 4])
def test_student_equal_to_mmseg(channels):
    data = batch(channels)
    ours = UDATTAModel(Segmentor(channels, teacher=False)).test_step(data)
    stock = SegTTAModel(Segmentor(channels, teacher=False)).test_step(data)
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)
        assert 'teacher_pred_sem_seg' not in a


@pytest.mark.parametrize('cascade', [False, True])
def test_one_channel_uses_the_heads_threshold(cascade):
    segmentor = Segmentor(1, teacher=True, threshold=0.6)
    if cascade:
        last = nn.Identity()
        last.threshold = 0.6
        segmentor.decode_head = nn.ModuleList([nn.Identity(), last])
    data = batch(1)
    for number, sample in enumerate(UDATTAModel(segmentor).test_step(data)):
        logits = upright(data, number)
        student = sum(one.sigmoid() for one in logits) / 3
        teacher = sum((-2 * one).sigmoid() for one in logits) / 3
        assert torch.equal(sample.pred_sem_seg.data, (student > .6).float())
        assert torch.equal(
            sample.teacher_pred_sem_seg.data, (teacher > .6).float())
        assert 0 < sample.pred_sem_seg.data.sum() < 30
