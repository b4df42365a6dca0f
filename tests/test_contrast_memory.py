"""Pixels and segments as one memory."""

import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_contrast import ops


def memory(**changes):
    return MODELS.build(dict(dict(
        type='MemoryBank', num_classes=3, channels=4, pixels=3, segments=2,
        number=2), **changes))


def fill(bank, rounds=3):
    for seed in range(rounds):
        gen = torch.Generator().manual_seed(seed)
        vectors = F.normalize(torch.randn(12, 4, generator=gen), dim=1)
        labels = torch.randint(0, 2, (12, ), generator=gen)
        bank.update(vectors, labels, torch.rand(12, generator=gen),
                    torch.arange(2).repeat_interleave(6), 2)
    return bank


def test_keys_are_those_of_both_queues():
    bank = fill(memory())
    keys, there = bank.stored()
    assert keys.shape == (3, 5, 4) and there[:2].all()
    assert not there[2].any()
    assert torch.equal(keys[:, :3], bank.pixels.keys)
    assert torch.equal(keys[:, 3:], bank.segments.keys)
    assert torch.equal(bank.age, torch.tensor([0, 0, -1]))
    mean, present = bank.centres()
    assert torch.allclose(mean[:2], keys[:2].mean(1))
    assert torch.equal(present, torch.tensor([True, True, False]))


@pytest.mark.parametrize('own', ['positive', 'energy'])
def test_the_loss_by_loops(own):
    bank = fill(memory())
    gen = torch.Generator().manual_seed(9)
    anchors = F.normalize(torch.randn(5, 4, generator=gen), dim=1)
    labels = torch.tensor([0, 1, 1, 2, 255])
    keys, there = bank.stored()
    terms = []
    for f, y in zip(anchors, labels.tolist(), strict=True):
        if y > 1:
            continue  # no key of class 2, and no class 255
        s = keys[:2] @ f / 0.1
        others = s[1 - y].logsumexp(0)
        each = [torch.logsumexp(torch.stack([
            one if own == 'positive' else s[y].logsumexp(0), others]), 0)
            - one for one in s[y]]
        terms.append(torch.stack(each).mean())
    want = torch.stack(terms).mean() * 0.1 / 0.07
    found = bank.loss(anchors, labels, 0.1, own, base_tau=0.07)
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    dense = ops.contrast_loss(
        bank.energies(anchors, 0.1), bank.positives(anchors, labels, 0.1),
        labels, own)
    assert found.item() == pytest.approx(dense.item() / 0.7, rel=1e-5)


def test_negatives_are_mixed_from_all_keys():
    bank = fill(memory())
    mixing = MODELS.build(dict(
        type='HardNegativeMixing', hardest=4, mixes=3, query_mixes=2))
    anchors = F.normalize(torch.randn(4, 4), dim=1)
    labels = torch.tensor([0, 1, 0, 1])
    draws = mixing.draw(4, torch.Generator().manual_seed(0))
    plain = bank.loss(anchors, labels, 0.1, 'positive')
    mixed = bank.loss(anchors, labels, 0.1, 'positive', mixing=mixing,
                      draws=draws)
    assert mixed > plain  # more in the denominator
    entries, classes = bank.entries()
    assert entries.shape == (15, 4)
    assert (classes == 2).sum() == 0 and (classes == -1).sum() == 5


def test_a_resumed_memory_is_the_same():
    one, two = fill(memory()), memory()
    two.load_state_dict(one.state_dict())
    fill(one), fill(two)
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name


@pytest.mark.parametrize('name', ['pixels', 'segments', 'number'])
def test_mistakes_are_named(name):
    with pytest.raises(ValueError, match=f'MemoryBank.{name}'):
        memory(**{name: 0})
