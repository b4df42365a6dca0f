"""Published contrast code, number by number, through kernel and banks.

tests/data/trim_contrast_golden.py says what is kept of the recording. Where
the published number has a defect, the one without it is compared as well,
and the published one by bringing the defect about by hand.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS

from mmseg_contrast import ops

FILE = Path(__file__).resolve().parent / 'data' / 'contrast.npz'
CLASSES, WIDTH, ITERATIONS = 6, 16, range(5)
SIZES = dict(num_classes=CLASSES, channels=WIDTH)
EXACT = dict(rel=1e-10, abs=1e-13)
#: Losses of the source without the class that has not been seen; from
#: independent formulas: SePiCo's ProtoCL and DistCL at tau 100 and at 0.1,
#: SDCA at tau 100 and 0.5.
WITHOUT_UNSEEN = [
    (1.605064464948, 1.605066009655, .098312991699, 1.552593890808,
     1.604578578286, 1.406980733927),
    (1.605328068192, 1.605329624357, .119786746331, 1.690798804144,
     1.604355529427, 1.361353134429),
    (1.605076189808, 1.605077739262, .085526162325, 1.554044447491,
     1.604364445413, 1.382885594280)]


@pytest.fixture(scope='module')
def golden():
    with np.load(FILE) as file:
        stored = {name: file[name] for name in file.files}
    start, values = 0, stored.pop('values')
    for name, shape in zip(stored.pop('names'), stored.pop('shapes'),
                           strict=True):
        shape = tuple(int(side) for side in str(shape).split('x') if side)
        size = int(np.prod(shape, dtype=int))
        stored[str(name)] = values[start:start + size].reshape(shape)
        start += size
    assert start == len(values)
    return {name: torch.from_numpy(one) if one.dtype.kind != 'U' else one
            for name, one in stored.items()}


def features(golden, name, iteration, unit=True):
    """Maps ``(2, D, 24, 24)`` in float64, a leaf."""
    maps = golden[f'feat_{name}'][iteration].double() / 256
    if unit:
        maps = F.normalize(maps, dim=1)
    return maps.requires_grad_()


def flat(maps):
    """Pixels of maps, ``(N, D)``, in the order of flattened labels."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def labels_of(golden, name, iteration):
    return golden[name][iteration].long().flatten()


def build(**config):
    return MODELS.build({**SIZES, **config}).double()


def close(got, want):
    assert got.item() == pytest.approx(want.item(), **EXACT)


def same(got, want):
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * scale)


def check_gradient(golden, name, grad):
    close(grad.norm(), golden[f'{name}_norm'])
    same(grad[..., ::8, ::8], golden[f'{name}_s8'])
    same(grad.sum((2, 3)), golden[f'{name}_chsum'])


# SPCL


def spcl_loss(bank, golden, i, source, target):
    return sum(
        bank.loss(F.normalize(flat(maps), dim=1),
                  labels_of(golden, f'spcl/{name}_mask', i), 100., 'energy')
        for maps, name in ((source, 'src'), (target, 'tgt')))


def test_spcl(golden):
    bank = build(type='PrototypeBank', clock='ema', new_weight=.9)
    bank.mean.copy_(golden['spcl/proto_init'].T.unsqueeze(1))
    bank.count.fill_(1)
    published = build(type='PrototypeBank')
    published.count.fill_(1)
    for i in ITERATIONS:
        source = features(golden, 'src', i, unit=False)
        target = features(golden, 'tgt', i, unit=False)
        bank.update(F.normalize(flat(source), dim=1),
                    labels_of(golden, 'spcl/src_mask', i))
        same(bank.mean[:, 0], golden['spcl/proto_absent_kept'][i].T)
        close(spcl_loss(bank, golden, i, source, target),
              golden['spcl/loss_absent_kept'][i])
        # The published prototypes of absent classes decay to 0.
        published.mean.copy_(golden['spcl/proto'][i].T.unsqueeze(1))
        loss = spcl_loss(published, golden, i, source, target)
        close(loss, golden['spcl/loss'][i])
        grads = torch.autograd.grad(loss, (source, target))
        for name, grad in zip(('src', 'tgt'), grads, strict=True):
            check_gradient(golden, f'spcl/it{i}/grad_{name}', grad)


def test_spcl_without_a_label_is_zero(golden):
    # The published loss is NaN.
    bank = build(type='PrototypeBank')
    bank.count.fill_(1)
    source = features(golden, 'src', 0)
    loss = bank.loss(flat(source), torch.full((1152, ), 255), 100., 'energy')
    grad, = torch.autograd.grad(loss, source)
    assert loss == 0 and grad.eq(0).all()


# SDCA


@pytest.mark.parametrize('tau', ['100', '0.5'])
def test_sdca(golden, tau):
    bank = build(type='GaussianBank', normalize='rows')
    for i in ITERATIONS:
        source = features(golden, 'src', i, unit=False)
        target = features(golden, 'tgt', i, unit=False)
        labels = labels_of(golden, 'label_src', i)
        bank.update(flat(source), labels)
        for name, mine in (('mean', bank.mean), ('var', bank.variance),
                           ('count', bank.count.double())):
            same(mine, golden[f'sdca/feat_{name}'][i])
        ours = bank.count.clone()
        assert (ours[5] == 0) == (i < 3)

        def loss(maps, y, bank=bank):
            return bank.loss(
                F.normalize(flat(maps), dim=1), y, float(tau), 'energy')

        if i < 3:
            assert loss(source, labels).item() == pytest.approx(
                WITHOUT_UNSEEN[i][4 + (tau == '0.5')], abs=1e-12)
            # In the published code the unseen class takes part with 0.
            bank.count.clamp_(min=1)
        first = loss(source, labels)
        close(first, golden[f'sdca/tau{tau}/loss_feat_src'][i])
        both = first + loss(target, labels_of(golden, 'sdca/tgt_mask', i))
        close(both, golden[f'sdca/tau{tau}/loss_feat'][i])
        if i % 2 == 0:
            grads = torch.autograd.grad(both, (source, target))
            for name, grad in zip(('src', 'tgt'), grads, strict=True):
                check_gradient(
                    golden, f'sdca/tau{tau}/it{i}/grad_feat_{name}', grad)
        bank.count.copy_(ours)


# SePiCo


def published_bank(golden, i):
    """The published queue with its zero rows, as if they were keys."""
    rows = golden['sepico/bank'][i]
    bank = build(type='SegmentQueue', length=4, segment='batch',
                 normalize=False, energy='mean')
    bank.keys.copy_(rows.nan_to_num())
    bank.filled.copy_(golden['sepico/bank_len'][i])
    return bank


def seen_by_sepico(golden, banks):
    """Updates of an iteration after the other, by the teacher's source."""
    for i in ITERATIONS:
        vectors = flat(features(golden, 'teacher', i)).detach()
        for bank in banks:
            bank.update(vectors, labels_of(
                golden, 'sepico/label_src_ratio', i))
        yield i


def test_sepico_states(golden):
    gaussian = build(type='GaussianBank')
    means = build(type='PrototypeBank')
    queue = build(type='SegmentQueue', length=4, segment='batch',
                  normalize=False, energy='mean')
    for i in seen_by_sepico(golden, (gaussian, means, queue)):
        same(means.mean[:, 0], golden['sepico/mean'][i])
        same(gaussian.mean, golden['sepico/mean'][i])
        same(gaussian.variance, golden['sepico/var'][i])
        assert gaussian.count.tolist() == golden['sepico/count'][i].tolist()
        for c in range(CLASSES):
            # The published queue begins with a row of zeros.
            rows = golden['sepico/bank'][i, c]
            rows = rows[:golden['sepico/bank_len'][i, c]]
            rows = rows[rows.ne(0).any(1)]
            assert queue.filled[c] == len(rows)
            places = (queue.pointer[c] - len(rows)
                      + torch.arange(len(rows))) % 4
            torch.testing.assert_close(
                queue.keys[c, places], rows, rtol=0, atol=1e-12)


def test_sepico_without_the_unseen_class(golden):
    banks = [build(type='PrototypeBank'), build(type='GaussianBank')]
    for i in seen_by_sepico(golden, banks):
        if i == len(WITHOUT_UNSEEN):
            break
        anchors = flat(features(golden, 'src', i))
        labels = labels_of(golden, 'sepico/label_src_ratio', i)
        got = [bank.loss(anchors, labels, tau, 'energy').item()
               for tau in (100., .1) for bank in banks]
        assert got == pytest.approx(WITHOUT_UNSEEN[i][:4], abs=1e-12)


@pytest.mark.parametrize('kind', ['proto', 'dist', 'bank'])
def test_sepico(golden, kind):
    proto, dist = build(type='PrototypeBank'), build(type='GaussianBank')
    cases = golden['sepico/cases'].tolist()
    for i in seen_by_sepico(golden, (proto, dist)):
        queue = published_bank(golden, i)
        bank = dict(proto=proto, dist=dist, bank=queue)[kind]
        unseen = bank.state_dict()
        unseen = {name: one.clone() for name, one in unseen.items()}
        if kind != 'bank':
            bank.count.clamp_(min=1)  # published: it takes part with 0
        for domain in ('src', 'tgt'):
            for tau in ('100', '0.1'):
                maps = features(golden, domain, i)
                labels = labels_of(
                    golden, f'sepico/label_{domain}_ratio', i)
                plain = bank.loss(flat(maps), labels, float(tau),
                                  'positive' if kind == 'bank' else 'energy')
                extra = ops.contrast_regularizer(
                    flat(maps), labels, proto.mean[:, 0], float(tau))
                for reg, loss in (('', plain), ('_reg', plain + extra)):
                    case = f'{kind}{reg}_tau{tau}_{domain}'
                    place = cases.index(case)
                    close(loss, golden['sepico/loss'][place, i])
                    grad, = torch.autograd.grad(
                        loss, maps, retain_graph=True)
                    close(grad.norm(), golden['sepico/grad_norm'][place, i])
                    if f'sepico/it{i}/{case}/grad_s8' in golden:
                        check_gradient(
                            golden, f'sepico/it{i}/{case}/grad', grad)
        bank.load_state_dict(unseen)


# ContrastiveSeg


@pytest.mark.parametrize('i', [0, 3])
def test_contrastive_seg_without_memory(golden, i):
    run = f'cseg/no_memory_it{i}'
    maps = features(golden, 'src', i)
    pixels = maps.flatten(2)[
        golden[f'{run}/anchor_image'].unsqueeze(1), :,
        golden[f'{run}/anchor_pixel']]
    rows, views, _ = pixels.shape
    labels = golden[f'{run}/anchor_class'].long().repeat_interleave(views)
    bank = build(type='BatchBank', chunk_size=50)
    loss = bank.loss(pixels.flatten(0, 1), labels, .1, 'positive', .07)
    close(loss, golden[f'{run}/loss_f64'])
    grad, whole = torch.autograd.grad(loss, (pixels, maps))
    same(grad, golden[f'{run}/grad_anchor_f64'])
    narrow = bank.loss(
        pixels.detach().float().flatten(0, 1), labels, .1, 'positive', .07)
    assert narrow.item() == pytest.approx(
        golden[f'{run}/loss_f32'].item(), rel=2e-6)
    assert whole.norm().item() == pytest.approx(
        golden[f'{run}/grad_feat_f32_path_norm'].item(), rel=2e-6)


def test_contrastive_seg_memory(golden):
    # Recorded: queues that hold the pixels of the class, pushed at the
    # pointer, which goes on by their number. Class 0 was still left out.
    pixels = build(type='PixelQueue', length=12, number=5)
    segments = build(type='SegmentQueue', length=12)
    for i in range(3):
        vectors = flat(features(golden, 'src', i)).detach()
        labels = labels_of(golden, 'label_src', i)
        labels[labels == 0] = 255
        images = torch.arange(2).repeat_interleave(576)
        segments.update(vectors, labels, None, images, 2)
        draws = golden[f'cseg/memory/it{i}/draws'].long().split(
            golden[f'cseg/memory/it{i}/draw_lengths'].tolist())
        draws = iter(draws)
        for image in range(2):
            mine = slice(image * 576, (image + 1) * 576)
            scores = torch.zeros(576)
            for c in labels[mine].unique().tolist()[:-1]:
                there = (labels[mine] == c).nonzero().flatten()
                order = next(draws)
                scores[there[order]] = torch.linspace(1, .1, len(order))
            pixels.update(vectors[mine], labels[mine], scores)
        assert next(draws, None) is None
        assert pixels.pointer.tolist() == golden[
            f'cseg/memory/it{i}/pixel_ptr_corrected'].tolist()
        assert segments.pointer.tolist() == golden[
            f'cseg/memory/it{i}/segment_ptr'].tolist()
    for bank, name in ((pixels, 'pixel_queue_corrected'),
                       (segments, 'segment_queue')):
        there = bank.stored()[1]
        assert there.sum() >= 20 and not there[0].any()
        torch.testing.assert_close(
            bank.keys[there], golden[f'cseg/{name}'][there], rtol=0,
            atol=1e-12)
    # What has not been written are random rows there, and no keys here.
    assert segments.filled.tolist() == segments.pointer.tolist()


def test_contrastive_seg_with_memory(golden):
    queue = build(type='PixelQueue', length=12, chunk_size=100)
    queue.keys.copy_(golden['cseg/pixel_queue_corrected'])
    queue.filled.fill_(12)
    maps = features(golden, 'src', 3)
    labels = labels_of(golden, 'label_src', 3)
    got = queue.loss(flat(maps), labels, .1, 'positive', .07)
    known = labels != 255
    s = flat(maps)[known] @ queue.keys.flatten(0, 1).T / .1
    same_class = labels[known].unsqueeze(1) == torch.arange(
        CLASSES).repeat_interleave(12)
    others = (s.exp() * ~same_class).sum(1, keepdim=True)
    terms = s - (s.exp() + others).log()
    want = -(terms * same_class).sum(1).mean() / 12 * .1 / .07
    close(got, want)
    same(*(torch.autograd.grad(one, maps)[0] for one in (got, want)))


# CLUDA


def cluda(maps, labels, weights=None):
    """All pixels with all others, without a temperature."""
    # Label 255 is a class of its own in the published code.
    bank = build(type='BatchBank', num_classes=CLASSES + 1)
    loss = bank.loss(
        F.normalize(flat(maps), dim=1), labels, 1., 'positive',
        anchor_weights=weights, key_weights=weights)
    same(ops.resolution_contrast(flat(maps), labels, weights=weights), loss)
    return loss


@pytest.mark.parametrize('i', [0, 3])
def test_cluda(golden, i):
    run = f'cluda/single_it{i}'
    labels = labels_of(golden, 'label_src', i)
    published = labels.where(labels != 255, torch.tensor(CLASSES))
    maps = features(golden, 'src', i, unit=False)
    one = maps[:1].detach().requires_grad_()
    weights = golden[f'{run}/pseudo_weight'].flatten()
    for case, weight in (('plain', None), ('weighted', weights)):
        loss = cluda(one, published[:576], weight)
        close(loss, golden[f'{run}/{case}/loss'])
        grad, = torch.autograd.grad(loss, one)
        check_gradient(golden, f'{run}/{case}/grad', grad)
    close(cluda(one, labels[:576]), golden[f'{run}/plain/loss_without_255'])
    # Its own batches of two pair features with labels of other pixels.
    close(cluda(maps, published), golden[f'cluda/batch2_it{i}/loss_aligned'])


@pytest.mark.parametrize('case', ['source', 'mix'])
def test_cluda_at_two_resolutions(golden, case):
    run = 'cluda/multi_resolution_it3'
    low = features(golden, 'src', 3, unit=False)[:1].detach()
    high = features(golden, 'teacher', 3, unit=False)[:1].detach()
    attention = golden[f'{run}/att'].clone()
    for leaf in (low, high, attention):
        leaf.requires_grad_()
    y = labels_of(golden, 'label_src', 3)[:576]
    hr = golden[f'{run}/hr_label'].long().flatten()
    y2 = hr.where(hr != 0, y)
    p = golden[f'{run}/pseudo_weight'].flatten()
    p = torch.ones_like(p) if case == 'source' else p
    a, inside = attention.flatten(), (hr != 0).double()
    f, k = (F.normalize(flat(one), dim=1) for one in (low, high))

    def others(labels):
        return (labels.unsqueeze(1) == labels).sum(1) - 1

    # Both terms divide by the number of positives at the low resolution.
    ratio = others(y2) / others(y).clamp_min(1)

    # p_i p_j [w_ij l(low) + (1 - w_ij) l(high)], w_ij = [in]_i a_i a_j.
    near, across = ops.split_weights(a * inside, p, a)
    across = ratio.unsqueeze(1) * across[0], across[1]
    loss = .5 * sum(
        ops.pair_contrast_loss(
            f, keys, ops.same_label(labels, labels, -1), 1.,
            exclude_self=True, anchor_weights=mine, key_weights=theirs)
        for keys, labels, (mine, theirs) in ((f, y, near), (k, y2, across)))
    close(loss, golden[f'{run}/{case}/loss'])
    grads = torch.autograd.grad(loss, (low, high, attention))
    check_gradient(golden, f'{run}/{case}/grad_lr', grads[0])
    check_gradient(golden, f'{run}/{case}/grad_hr', grads[1])
    same(grads[2], golden[f'{run}/{case}/grad_att'])
