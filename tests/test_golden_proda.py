"""Published ProDA code, number by number: labels, losses, prototypes.

tests/data/trim_proda_golden.py says what is kept of the recording.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmseg_contrast import ops
from mmseg_contrast.adaptation import (
    PrototypeConsistency,
    PrototypeRectified,
    PrototypeState,
    PseudoLabels,
    SymmetricCrossEntropy,
    View,
)

DATA = Path(__file__).resolve().parent / 'data'
CLASSES, WIDTH, ITERATIONS = 6, 16, range(5)
EXACT = dict(rtol=1e-10, atol=1e-13)
# The recording took the one-hot labels' logarithm in float32.
NEARLY = dict(rtol=3e-8, atol=1e-10)


@pytest.fixture(scope='module')
def golden():
    stored = {}
    for name in ('contrast.npz', 'proda.npz'):
        with np.load(DATA / name) as file:
            stored.update({key: torch.from_numpy(file[key])
                           for key in file.files
                           if file[key].dtype.kind != 'U'})
    return stored


def maps(golden, name, i):
    return (golden[name][i].double() / 256).requires_grad_()


def weak(features):
    """What the weak augmentation made of the whole view."""
    larger = F.interpolate(features[1:], (28, 28), mode='bilinear',
                           align_corners=True)
    return torch.cat([features[:1], larger[:, :, 2:26, 3:27].flip(3)])


class FakeStep:
    """One iteration: the teacher's pass, soft labels, the student's pass."""

    def __init__(self, golden, i, state):
        self.states = dict(prototypes=state)
        self.logs = {}
        self.teacher_features = weak(maps(golden, 'feat_teacher', i))
        self.soft = maps(golden, 'logit_tgt', i).detach().softmax(1)
        self.logits = maps(golden, 'logit_src', i)
        self.strong = maps(golden, 'feat_tgt', i)

    def view(self, name):
        return View(name, torch.zeros(2, 3, 24, 24), 'target')

    def teacher(self, name, view):
        return self.soft

    def teacher_pass(self, name, view):
        return SimpleNamespace(decoder_features=self.teacher_features)

    def student(self, view):
        return SimpleNamespace(logits=self.logits,
                               decoder_features=self.strong)

    def pseudo_label(self, name):
        return PrototypeRectified()(self, name)

    def log(self, key, value):
        self.logs[key] = value


def prototypes(golden, momentum):
    state = PrototypeState(CLASSES, WIDTH, momentum=momentum,
                           mean_until=0).double()
    state.mean.copy_(golden['proto_init'])
    state.count.fill_(1)  # there from the start
    return state


def train(golden, momentum):
    """Every iteration's step, before its prototypes are updated."""
    state = prototypes(golden, momentum)
    for i in ITERATIONS:
        yield i, FakeStep(golden, i, state), state
        logits = maps(golden, 'logit_src', i)
        state.take(maps(golden, 'feat_teacher', i), logits.argmax(1))


def test_golden_labels(golden):
    for i, step, state in train(golden, 1e-4):
        weights = ops.prototype_scores(
            step.teacher_features, state.mean, state.exists, 1.).exp()
        torch.testing.assert_close(
            weights[..., ::8, ::8], golden['weights'][i], **EXACT)
        pseudo = PrototypeRectified()(step, 'target')
        torch.testing.assert_close(
            pseudo.probs[..., ::8, ::8], golden['rectified'][i], **EXACT)
        assert torch.equal(pseudo.labels.unsqueeze(1),
                           golden['pseudo_label'][i].long())
        assert pseudo.weights.eq(1).all()
        if i == 0:
            torch.testing.assert_close(
                step.soft[..., ::4, ::4], golden['soft_pseudo_label'],
                **EXACT)


def same_gradient(got, golden, name):
    torch.testing.assert_close(got[..., ::8, ::8], golden[f'{name}_s8'],
                               **NEARLY)
    torch.testing.assert_close(got.sum((2, 3)), golden[f'{name}_chsum'],
                               **NEARLY)
    torch.testing.assert_close(got.norm(), golden[f'{name}_norm'], **NEARLY)


@pytest.mark.parametrize('momentum', [1e-4, .1])
def test_golden_losses(golden, momentum):
    run = f'm{momentum:g}'
    student = SimpleNamespace(out_channels=CLASSES, align_corners=False)
    # The objective casts to float32; its parts are compared in float64.
    symmetric = SymmetricCrossEntropy(student)
    consistency = PrototypeConsistency(weight=1., strong='target')
    for i, step, state in train(golden, momentum):
        labels = step.pseudo_label('target').labels
        reverse = ops.symmetric_cross_entropy(step.logits, labels, 0., 1.)
        regular = ops.uniform_divergence(step.logits)
        torch.testing.assert_close(reverse, golden[f'{run}/rce'][i], **NEARLY)
        torch.testing.assert_close(
            regular, golden[f'{run}/regular'][i], **EXACT)
        loss = ops.symmetric_cross_entropy(
            step.logits, labels) + .1 * regular
        torch.testing.assert_close(loss, golden[f'{run}/loss_cts'][i],
                                   **NEARLY)
        apart = consistency(step)['loss_consistency']
        torch.testing.assert_close(
            apart, golden[f'{run}/loss_consist'][i], **EXACT)
        torch.testing.assert_close(
            (loss + apart).view(1), golden[f'{run}/loss'][i], **NEARLY)
        if i in (0, 3):
            out, = torch.autograd.grad(loss, step.logits)
            same_gradient(out, golden, f'{run}/it{i}/grad_out')
            strong, = torch.autograd.grad(apart, step.strong)
            same_gradient(strong, golden, f'{run}/it{i}/grad_feat_strong')
        single = symmetric(step)
        assert sum(single.values()).item() == pytest.approx(
            loss.item(), rel=1e-6)
        assert not state.mean.requires_grad


@pytest.mark.parametrize('momentum', [1e-4, .1])
def test_golden_prototypes(golden, momentum):
    run = f'm{momentum:g}'
    state = prototypes(golden, momentum)
    for i in ITERATIONS:
        features = maps(golden, 'feat_teacher', i).detach()
        labels = maps(golden, 'logit_src', i).argmax(1)
        if momentum == .1:
            means, exists = ops.image_class_means(
                features, labels, CLASSES, 10)
            # Recorded image after image, classes ascending.
            ids = exists.T.nonzero()[:, 1]
            assert torch.equal(ids, golden[f'{run}/it{i}/update_ids'])
            torch.testing.assert_close(
                means.transpose(0, 1)[exists.T],
                golden[f'{run}/it{i}/update_vectors'], **EXACT)
        state.take(features, labels)
        torch.testing.assert_close(state.mean, golden[f'{run}/proto'][i],
                                   **EXACT)
        assert torch.equal(state.count - 1,
                           golden[f'{run}/proto_num'][i].long())


def test_golden_first_mean(golden):
    state = PrototypeState(CLASSES, WIDTH, mean_until=100).double()
    for i in ITERATIONS:
        state.take(maps(golden, 'feat_src', i),
                   maps(golden, 'logit_src', i).argmax(1))
    torch.testing.assert_close(
        state.mean, golden['offline_mean/proto'], **EXACT)
    assert torch.equal(state.count, golden['offline_mean/proto_num'].long())


def test_pixels_of_weight_0_are_ignored(golden):
    _, step, _ = next(train(golden, .1))
    pseudo = PrototypeRectified(threshold=.3)(step, 'target')
    assert 0 < pseudo.weights.mean() < 1
    step.pseudo_label = lambda name: pseudo
    student = SimpleNamespace(out_channels=CLASSES, align_corners=False)
    got = SymmetricCrossEntropy(student, weight=2., regular=.5)(step)
    labels = pseudo.labels.where(pseudo.weights > 0, torch.tensor(255))
    torch.testing.assert_close(
        got['loss_symmetric'], 2 * ops.symmetric_cross_entropy(
            step.logits.float(), labels))
    torch.testing.assert_close(
        got['loss_regular'], ops.uniform_divergence(step.logits.float()))


def test_golden_ignored_pixels_count_nowhere(golden):
    _, step, _ = next(train(golden, .1))
    pseudo = step.pseudo_label('target')
    assert isinstance(pseudo, PseudoLabels)
    labels = pseudo.labels.clone()
    labels[:, :12] = 255
    half = ops.symmetric_cross_entropy(step.logits, labels)
    want = ops.symmetric_cross_entropy(step.logits[:, :, 12:],
                                       labels[:, 12:])
    torch.testing.assert_close(half, want, **EXACT)
    nothing = ops.symmetric_cross_entropy(
        step.logits, torch.full_like(labels, 255))
    grad, = torch.autograd.grad(nothing, step.logits)
    assert nothing == 0 and grad.eq(0).all()
