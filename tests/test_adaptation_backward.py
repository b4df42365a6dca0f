"""A backward for each group of objectives equals that of the sum."""

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

from helpers import (
    ScaledWrapper,
    batch,
    build,
    dacs_parts,
    double,
    run,
    tiny_student,
)
from mmseg_contrast.adaptation import backward, graph
from mmseg_contrast.adaptation import segmentor as segmentor_module


class Needing(nn.Module):

    def __init__(self, *views):
        super().__init__()
        self.needs = views


@pytest.mark.parametrize('needs,want', [
    (dict(a='x', b='y', c='z'), [['a'], ['b'], ['c']]),
    (dict(a='x', b='y', c='x'), [['a', 'c'], ['b']]),
    # The last one joins two groups that were apart until then.
    (dict(a='x', b='y', c='z', d='zx'), [['a', 'c', 'd'], ['b']]),
    (dict(a='x', b='xy', c='yz', d='z'), [['a', 'b', 'c', 'd']]),
    (dict(a='', b='x', c=''), [['a'], ['b'], ['c']]),
])
def test_groups_share_no_view(needs, want):
    parts = {name: Needing(*views) for name, views in needs.items()}
    assert graph.groups(parts, list(needs)) == want


def parts_with_mask(**changes):
    """DACS with a masked view and a contrast of source and mixed images."""
    parts = dacs_parts()
    parts['views'].update(
        labelled=dict(type='PseudoLabelled', view='target'),
        masked=dict(type='BlockMask', view='labelled', block=8))
    parts['objectives'].update(
        masked=dict(type='Segmentation', view='masked'),
        contrast=dict(type='Contrast', anchors=['source', 'mixed_strong'],
                      bank=['source']))
    return dict(parts, **changes)


def contrasting():
    return dict(tiny_student(dropout=0.3), auxiliary_head=dict(
        type='ContrastHead', in_channels=8, num_classes=5, channels=6,
        in_index=1, tau=0.5, bank=dict(type='PrototypeBank')))


def make(mode, **changes):
    return build(contrasting(), backward=mode,
                 **parts_with_mask(**changes)).double()


def train(mode, steps=5, lr=0.1, kind=OptimWrapper, **options):
    """Weights, teachers and logs after some steps, in float64."""
    model = make(mode)
    optim_wrapper = kind(
        optimizer=torch.optim.SGD(
            model.segmentor.parameters(), lr, momentum=0.9),
        **copy.deepcopy(options))
    optim_wrapper.initialize_count_status(model, 0, steps)
    logs = [model.train_step(double(batch(seed=i)), optim_wrapper)
            for i in range(steps)]
    return model, logs, optim_wrapper


@pytest.mark.parametrize('options', [
    {}, dict(accumulative_counts=2),
    dict(accumulative_counts=3, clip_grad=dict(max_norm=0.1)),
    dict(accumulative_counts=2, kind=ScaledWrapper)],
    ids=['plain', 'accumulated', 'clipped', 'scaled'])
def test_the_same_training(options):
    (one, logs, first), (two, others, second) = (
        train(mode, **options) for mode in backward.MODES)
    for (key, value), other in zip(
            one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(
            value, other, rtol=1e-10, atol=1e-12, msg=key)
    assert first._inner_count == second._inner_count == 5
    for said, other in zip(logs, others, strict=True):
        assert list(said)[0] == list(other)[0] == 'loss'
        assert set(said) == set(other)
        for key, value in said.items():
            assert other[key].item() == pytest.approx(
                value.item(), rel=1e-9), key
    # Training did something, and the contrast and the mask took part in it.
    fresh = make('sum')
    assert not torch.equal(fresh.segmentor.backbone.layers[0][0].weight,
                           one.segmentor.backbone.layers[0][0].weight)
    assert two.groups == [['source', 'contrast', 'mixed'], ['masked']]


class Kept:
    """Bytes that graphs keep for their backward, and the most at a time."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        return Saved(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            self.pack, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Saved:

    def __init__(self, kept, tensor):
        self.kept, self.tensor = kept, tensor
        self.size = tensor.numel() * tensor.element_size()
        kept.now += self.size
        kept.most = max(kept.most, kept.now)

    def __del__(self):
        self.kept.now -= self.size


def test_less_is_kept_at_a_time():
    most = {}
    for mode in backward.MODES:
        model = build(backward=mode, **dacs_parts())
        optim_wrapper = OptimWrapper(
            torch.optim.SGD(model.segmentor.parameters(), 0.1))
        with Kept() as kept:
            model.train_step(batch(size=(64, 64)), optim_wrapper)
        assert kept.now == 0
        most[mode] = kept.most
    # Two equal passes, one after the other.
    assert 0.45 < most['sequential'] / most['sum'] < 0.6


@pytest.mark.parametrize('counts, times', [(1, 5), (2, 3)])
def test_ranks_meet_once_in_an_update(monkeypatch, counts, times):
    sent = []
    monkeypatch.setattr(
        backward, 'all_reduce_params', lambda grads, **options: sent.append(
            sum(grad.numel() for grad in grads)))
    model, _, _ = train('sequential', accumulative_counts=counts)
    assert len(model.groups) == 2
    # The last of five iterations is an update in any case.
    assert sent == times * [sum(
        one.numel() for one in model.segmentor.parameters())]


def test_states_move_after_all_losses(monkeypatch):
    model = make('sequential')
    seen = []
    for name, objective in model.objectives.items():
        objective.register_forward_pre_hook(
            lambda *_, name=name: seen.append(name))
    monkeypatch.setattr(
        model, 'finish', lambda step: seen.append('finish') or {})
    model.train_step(double(batch()), OptimWrapper(
        torch.optim.SGD(model.segmentor.parameters(), 0.1)))
    assert seen[-1] == 'finish' and len(seen) == 5
    assert [name for group in model.groups for name in group] == seen[:-1]


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match='model.backward must be one of'):
        build(backward='twice', **dacs_parts())
    monkeypatch.setattr(segmentor_module, 'get_world_size', lambda: 2)
    with pytest.raises(ValueError, match='UDADistributedDataParallel'):
        run(build(backward='sequential', **dacs_parts()), batch())
    run(build(**dacs_parts()), batch())


@pytest.mark.parametrize('mode', backward.MODES)
def test_contrast_alone_leaves_no_weight_without_a_gradient(mode):
    parts = parts_with_mask()
    contrast = parts['objectives']['contrast']
    model = build(contrasting(), backward=mode, **dict(
        parts, objectives=dict(contrast=contrast)))
    optim_wrapper = OptimWrapper(
        torch.optim.SGD(model.segmentor.parameters(), 0.1))
    optim_wrapper.zero_grad = lambda: None
    model.train_step(batch(), optim_wrapper)
    for name, weight in model.segmentor.named_parameters():
        assert weight.grad is not None, name
    assert not model.decode_head.conv_seg.weight.grad.any()
    assert model.backbone.layers[0][0].weight.grad.any()
