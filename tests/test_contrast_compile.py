"""Shapes alone decide what torch.compile makes of the contrast."""

import pytest
import torch
import torch.nn.functional as F

from mmseg_contrast import ops

CLASSES, WIDTH = 5, 8


def prototypes(anchors, labels, keys):
    energies = ops.prototype_energies(anchors, keys[:, 0], 0.1)
    return ops.contrast_loss(
        energies, ops.own_class(energies, labels), labels)


def sorted_keys(anchors, labels, keys):
    filled = keys[..., 0] > 0
    return ops.class_contrast_loss(anchors, labels, keys, filled, 0.1)


def class_means(anchors, labels, keys):
    filled = keys[..., 0] > 0
    return ops.class_contrast_loss(
        anchors, labels, keys, filled, 0.1, energy='mean')


def pairs(anchors, labels, keys):
    return ops.pair_contrast_loss(
        anchors, anchors, ops.same_label(labels, labels), 0.1,
        exclude_self=True)


@pytest.mark.parametrize('loss', [
    prototypes, sorted_keys, class_means, pairs])
def test_other_labels_compile_nothing_anew(loss):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    count = CompileCounter()
    compiled = torch.compile(loss, backend=count)
    frames = []
    for seed in range(4):
        gen = torch.Generator().manual_seed(seed)
        anchors = F.normalize(
            torch.randn(16, WIDTH, generator=gen), dim=1).requires_grad_()
        labels = torch.randint(0, CLASSES, (16, ), generator=gen)
        labels[:4 * seed] = 255
        keys = torch.randn(CLASSES, 3, WIDTH, generator=gen)
        found = compiled(anchors, labels, keys)
        assert torch.allclose(found, loss(anchors, labels, keys))
        found.backward()
        frames.append(count.frame_count)
    assert frames == [frames[0]] * 4 and frames[0] > 0
