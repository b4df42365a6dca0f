"""Contrast in adaptation: views, banks, teachers, schedules."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from test_models_contrast_head import head_config

from helpers import CLASSES, batch, build, dacs_parts, run, tiny_student, total


def student(heads=None, dropout=0.0, **changes):
    config = tiny_student(dropout=dropout)
    config['auxiliary_head'] = head_config(**changes) if heads is None else (
        heads)
    return config


def parts(**contrast):
    """DACS with contrast on source and target."""
    options = dict(type='Contrast', head='aux')
    options.update(contrast)
    base = dacs_parts()
    base['objectives']['contrast'] = options
    return base


def model_with(seed=0, head=None, **contrast):
    model = build(student(**(head or {})), seed=seed, **parts(**contrast))
    model.keep_step = True
    return model


def pixels_of(model, view, who='student'):
    """Vectors and labels at stride 4, by hand."""
    step = model.last_step
    seen = step.view(view)
    net = model.segmentor if who == 'student' else (
        model.teachers['ema'].model)
    maps = net.auxiliary_head.project(net.extract_feat(seen.images))
    labels = seen.labels
    if labels is None:
        labels = step.pseudo_label(view).labels
    return maps.permute(0, 2, 3, 1).flatten(0, 2), labels[
        :, ::4, ::4].flatten()


def prototypes(vectors, labels):
    return torch.stack([vectors[labels == c].mean(0)
                        for c in range(CLASSES)])


@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_the_loss_of_each_view_by_hand(who):
    model = model_with(bank_from=who)
    losses = run(model, batch())
    mean = prototypes(*pixels_of(model, 'source', who)).detach()
    assert torch.allclose(
        model.segmentor.auxiliary_head.bank.mean[:, 0], mean, atol=1e-6)
    for view in ('source', 'target'):
        vectors, labels = pixels_of(model, view)
        known = labels != 255
        want = F.cross_entropy(
            vectors[known] @ mean.T / 0.5, labels[known])
        found = losses[f'contrast.loss_{view}']
        assert found.item() == pytest.approx(want.item(), rel=1e-5)
        assert found.requires_grad


def test_segmentation_leaves_a_claimed_head_alone():
    losses = run(model_with(), batch())
    assert sorted(losses) == [
        'contrast.loss_source', 'contrast.loss_target', 'ema.momentum',
        'mixed.decode.loss_ce', 'mixed_strong.agreement',
        'source.decode.loss_ce', 'target.confident_ratio',
        'target.pseudo_weight']


def step_of(model, optimizer, data):
    losses = run(model, data)
    optimizer.zero_grad()
    total(losses).backward()
    optimizer.step()
    return losses


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.segmentor.parameters(), lr=1e-2)
    return [step_of(model, optimizer, batch(seed=i)) for i in range(steps)]


@pytest.mark.parametrize('anchors', [('source', 'target'), ('mixed', )])
def test_weight_0_is_dacs_bit_for_bit(anchors):
    plain = build(tiny_student(dropout=0.3), **dacs_parts())
    mine = build(student(dropout=0.3, loss_weight=0.),
                 **parts(anchors=anchors, bank_from='teacher'))
    for want, found in zip(train(plain), train(mine), strict=True):
        for key, value in want.items():
            assert torch.equal(found[key], value), key
    theirs = mine.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(theirs[key], value), key


def test_a_weight_changes_the_student():
    plain = build(tiny_student(), **dacs_parts())
    mine = build(student(), **parts())
    train(plain), train(mine)
    assert not torch.equal(mine.backbone.layers[0][0].weight,
                           plain.backbone.layers[0][0].weight)


def test_a_teacher_has_the_projection_but_no_bank():
    model = model_with(head=dict(bank=dict(type='PixelQueue', length=4)))
    keys = set(model.state_dict())
    assert 'auxiliary_head.bank.keys' in keys
    assert 'teachers.ema.model.auxiliary_head.projection.layers.0.conv.' \
        'weight' in keys
    assert not any('bank' in key for key in keys
                   if key.startswith('teachers'))
    train(model)
    mine = model.segmentor.auxiliary_head.projection.layers[0].conv.weight
    taught = model.teachers['ema'].model.auxiliary_head.projection
    assert not torch.equal(taught.layers[0].conv.weight, mine)
    assert torch.allclose(taught.layers[0].conv.weight, mine, atol=0.1)


def test_the_bank_takes_each_batch_once():
    model = model_with(bank=('source', 'target'))
    run(model, batch())
    step = model.last_step
    known = (step.view('source').labels[:, ::4, ::4] != 255).sum()
    count = model.segmentor.auxiliary_head.bank.count.sum()
    assert count == known + step.pseudo_label('target').labels[
        :, ::4, ::4].numel()


def test_pixels_without_confidence_are_ignored():
    data = batch()
    model = model_with(anchors=('target', ), min_confidence=0.26)
    head = model.segmentor.auxiliary_head
    head.keep_anchors = True
    run(model, data)
    confidence = model.last_step.pseudo_label('target').confidence[
        :, ::4, ::4].flatten()
    labels = head.last[-1]['labels']
    assert 0 < (confidence < 0.26).sum() < len(labels)
    assert torch.equal(labels == 255, confidence < 0.26)
    # No pixel is: a loss of 0, with a graph.
    model = model_with(anchors=('target', ), min_confidence=1.)
    losses = run(model, data)
    assert losses['contrast.loss_target'].item() == 0
    losses['contrast.loss_target'].backward()


def test_margins_are_ignored_whatever_the_share_of_confident_pixels():
    base = parts(anchors=('target', ))
    base['pseudo_labels']['target']['threshold'] = 1.
    model = build(student(), **base)
    model.keep_step = True
    head = model.segmentor.auxiliary_head
    head.keep_anchors = True
    data = batch()
    for one in data['data_samples']['target']:
        valid = torch.ones(1, 32, 32, dtype=torch.uint8)
        valid[:, :8] = 0
        one.valid_region = PixelData(data=valid)
    run(model, data)
    assert model.last_step.pseudo_label('target').weights.sum() == 0
    labels = head.last[-1]['labels'].view(2, 8, 8)
    assert (labels[:, :2] == 255).all() and (labels[:, 2:] < CLASSES).all()


def test_only_correct_pixels_fill_the_bank():
    model = model_with(correct_only=('source', ))
    run(model, batch())
    step = model.last_step
    labels = step.view('source').labels[:, ::4, ::4]
    right = (step.student('source').logits.argmax(1) == labels).sum()
    assert model.segmentor.auxiliary_head.bank.count.sum() == right > 0


def test_joint_anchors_are_one_set():
    bank = dict(type='BatchBank')
    both = model_with(head=dict(bank=bank), joint=True, bank=())
    losses = run(both, batch())
    vectors, labels = zip(
        pixels_of(both, 'source'), pixels_of(both, 'target'), strict=True)
    want = both.segmentor.auxiliary_head.bank.loss(
        torch.cat(vectors), torch.cat(labels), 0.5, 'energy')
    assert losses['contrast.loss_contrast'].item() == pytest.approx(
        want.item(), rel=1e-5)


@pytest.mark.parametrize('bank', [
    dict(scope='image'), dict(scope='block', block_size=3),
    dict(rule='teacher_topk', k=2)])
def test_places_and_teachers_reach_the_pairs(bank):
    base = parts(anchors=('source', ), bank=(), keys='strong')
    base['views']['strong'] = dict(type='StrongAugment', view='source')
    one = dict(type='BatchBank', **bank)
    model = build(student(bank=one), **base)
    model.keep_step = True
    losses = run(model, batch())
    sets = [pixels_of(model, view) for view in ('source', 'strong')]
    taught = [pixels_of(model, view, 'teacher')[0]
              for view in ('source', 'strong')]
    places = torch.arange(128)
    images = places // 64
    blocks = images * 9 + places % 64 // 8 // 3 * 3 + places % 8 // 3
    want = model.segmentor.auxiliary_head.bank.loss(
        *sets[0], 0.5, 'energy', keys=sets[1][0], key_labels=sets[1][1],
        images=images, key_images=images, blocks=blocks, key_blocks=blocks,
        teacher=taught[0], key_teacher=taught[1])
    assert want > 0
    assert losses['contrast.loss_source'].item() == pytest.approx(
        want.item(), rel=1e-5)


def test_shuffled_labels_are_the_same_at_other_places():
    model = model_with(anchors=('source', ), shuffle=True)
    head = model.segmentor.auxiliary_head
    head.keep_anchors = True
    run(model, batch())
    found = head.last[-1]['labels']
    want = model.last_step.view('source').labels[:, ::4, ::4].flatten()
    assert torch.equal(found.sort()[0], want.sort()[0])
    assert not torch.equal(found, want)
    # The bank has the true ones.
    assert torch.equal(head.bank.count[:, 0], want[want != 255].bincount())


def test_keys_of_another_view():
    base = parts(anchors=('source', ), bank=(), keys='strong')
    base['views']['strong'] = dict(type='StrongAugment', view='source')
    model = build(student(bank=dict(type='BatchBank')), **base)
    model.keep_step = True
    losses = run(model, batch())
    vectors, labels = pixels_of(model, 'source')
    keys, same = pixels_of(model, 'strong')
    want = model.segmentor.auxiliary_head.bank.loss(
        vectors, labels, 0.5, 'energy', keys=keys, key_labels=same)
    assert losses['contrast.loss_source'].item() == pytest.approx(
        want.item(), rel=1e-5)


def test_features_of_the_decoder_and_logits():
    heads = [head_config(features='decoder', channels=4),
             head_config(features='logits', in_channels=CLASSES,
                         channels=CLASSES, projection=dict(layers=0))]
    base = parts(head='aux_0')
    base['objectives']['logits'] = dict(
        type='Contrast', head='aux_1', bank_from='teacher')
    model = build(student(heads), **base)
    losses = run(model, batch())
    assert {'contrast.loss_source', 'logits.loss_source'} < set(losses)
    losses['contrast.loss_source'].backward(retain_graph=True)
    assert model.decode_head.convs[0].conv.weight.grad.abs().sum() > 0
    assert model.decode_head.conv_seg.weight.grad is None
    losses['logits.loss_source'].backward()
    assert model.decode_head.conv_seg.weight.grad.abs().sum() > 0


def test_a_pass_of_the_teacher_is_not_repeated(monkeypatch):
    model = model_with(bank=('target', ), bank_from='teacher',
                       anchors=('source', ))
    taught = model.teachers['ema'].model
    real, count = taught.backbone.forward, []

    def counted(*args):
        count.append(1)
        return real(*args)

    monkeypatch.setattr(taught.backbone, 'forward', counted)
    run(model, batch())
    passes = len(count)
    step = model.last_step
    step.predictions.clear()
    found = step.teacher('ema', 'target')
    assert len(count) == passes  # of the pass for the embeddings
    want = taught.encode_decode(
        step.view('target').images,
        [dict(img_shape=(32, 32), ori_shape=(32, 32), pad_shape=(32, 32),
              padding_size=(0, 0, 0, 0))] * 2)
    want = F.interpolate(want, (32, 32), mode='bilinear').softmax(1)
    assert torch.allclose(found, want, atol=1e-5)


def test_nothing_is_skipped_before_the_start():
    model = model_with(head=dict(start=1))
    losses = run(model, batch())
    assert losses['contrast.loss_contrast'].item() == 0
    total(losses).backward()
    for name, parameter in model.segmentor.auxiliary_head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert 'target' not in model.last_step.students
    assert (model.segmentor.auxiliary_head.bank.count > 0).all()
    assert run(model, batch())['contrast.loss_target'].item() > 0


def test_resume_goes_on_where_it_was():
    head = dict(bank=dict(type='PixelQueue', length=6, number=2),
                sampler=dict(type='PerClassRandom', number=3), own='positive')
    one = model_with(head=head)
    train(one, 2)
    two = model_with(seed=1, head=head)
    two.load_state_dict(one.state_dict())
    want, found = run(one, batch(seed=5)), run(two, batch(seed=5))
    assert want['contrast.loss_target'] > 0
    for key, value in want.items():
        assert torch.equal(found[key], value), key


def test_extra_passes_leave_norms_alone():
    plain = build(tiny_student(), **dacs_parts())
    mine = model_with()
    run(plain, batch()), run(mine, batch())
    for name, value in plain.segmentor.named_buffers():
        assert torch.equal(dict(mine.segmentor.named_buffers())[name],
                           value), name
    recording = model_with(update_norm=True)
    run(recording, batch())
    assert not torch.equal(recording.backbone.layers[0][1].running_mean,
                           plain.backbone.layers[0][1].running_mean)


@pytest.mark.parametrize('change, message', [
    (dict(head='aux_1'), r"head = 'aux_1' is no ContrastHead"),
    (dict(bank_from='bank'), 'bank_from'),
    (dict(min_confidence=2.), 'min_confidence'),
    (dict(anchors='source'), 'anchors must be a list'),
    (dict(anchors=()), 'names no view'),
    (dict(keys='target'), 'for a head with a BatchBank'),
    (dict(pseudo_labels=dict(target='none')), "pseudo_labels names 'none'"),
    (dict(bank_from='teacher', teacher='slow'), "teacher = 'slow'")])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(student(), **parts(**change))


def test_a_head_has_one_objective():
    with pytest.raises(ValueError, match='no objective uses'):
        build(student(), **dacs_parts())
    base = parts()
    base['objectives']['again'] = dict(type='Contrast')
    with pytest.raises(ValueError, match='both claim'):
        build(student(), **base)


def test_a_view_without_labels_is_named():
    model = build(student(), **parts(pseudo_labels={}))
    with pytest.raises(ValueError, match="view 'target' needs labels"):
        run(model, batch())


# The device and several ranks


@pytest.mark.parametrize('head', [
    dict(bank=dict(type='PrototypeBank'), label_rule='ratio'),
    dict(bank=dict(type='GaussianBank')),
    dict(bank=dict(type='MemoryBank', pixels=5, segments=5), own='positive',
         sampler=dict(type='HardEasy', max_samples=8, max_views=4)),
    dict(bank=dict(type='BatchBank'), mixing=dict(type='HardNegativeMixing'),
         sampler=dict(type='PerClassRandom', number=4))])
def test_nothing_asks_for_a_value(head, monkeypatch):
    # Meta tensors have none, so whatever would wait for a GPU is an error.
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
    one = MODELS.build(head_config(**head)).to('meta').train()
    maps = [torch.randn(2, 8, side, side, device='meta',
                        requires_grad=True) for side in (16, 8)]
    labels = torch.zeros(2, 32, 32, dtype=torch.int64, device='meta')
    logits = torch.randn(2, CLASSES, 8, 8, device='meta')
    pixels = one.pixels(one.project(maps), labels, logits, True)
    generator = torch.Generator().manual_seed(0)
    one.update_bank(pixels, generator)
    one.contrast(pixels, generator).backward()
    assert maps[1].grad.shape == maps[1].shape


BANKS = dict(
    prototypes=dict(bank=dict(type='PrototypeBank')),
    memory=dict(bank=dict(type='MemoryBank', pixels=6, segments=6),
                own='positive', projection=dict(layers=2)),
    late=dict(bank=dict(type='GaussianBank'), start=2))


def run_rank(rank, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=(folder / 'meeting').as_uri(), rank=rank,
        world_size=2)
    results = {}
    for name, head in BANKS.items():
        model = model_with(head=head, bank_from='teacher')
        both = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False)
        optimizer = torch.optim.AdamW(
            model.segmentor.parameters(), lr=1e-2)
        for seed in range(4):
            data = batch(seed=10 * rank + seed)
            if rank == 1 and seed == 2:  # nothing to contrast here
                for one in data['data_samples']['source']:
                    one.gt_sem_seg.data.fill_(255)
            data = model.data_preprocessor(data, True)
            losses = both(**data, mode='loss')
            optimizer.zero_grad()
            total(losses).backward()
            optimizer.step()
        results[name] = model.state_dict()
    torch.save(results, folder / f'{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_ranks_train_one_model_with_one_bank(tmp_path):
    processes = torch.multiprocessing.start_processes(
        run_rank, (tmp_path, ), nprocs=2, join=False, daemon=True,
        start_method='fork')
    assert any(processes.join(timeout=30) for _ in range(3))
    one, two = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    for kind in BANKS:
        for key, value in one[kind].items():
            if 'running_' in key:  # of each rank's own batch
                continue
            assert torch.equal(two[kind][key], value), (kind, key)
        assert any('bank' in key for key in one[kind])


def test_a_state_that_is_not_there_is_named():
    base = dacs_parts()
    base['pseudo_labels']['target'] = dict(type='PrototypeRectified')
    with pytest.raises(ValueError, match=r'pseudo_labels.target.state'):
        build(tiny_student(), **base)


def test_labels_of_a_view_are_scaled_once(monkeypatch):
    from mmseg_contrast.models import contrast_head
    real, count = contrast_head.labels_at, []

    def counted(*args):
        count.append(1)
        return real(*args)

    monkeypatch.setattr(contrast_head, 'labels_at', counted)
    run(model_with(), batch())
    assert len(count) == 2  # source, which also fills the bank, and target


def test_a_filter_of_supervised_training_is_named():
    with pytest.raises(ValueError, match='correct_only=True'):
        build(student(correct_only=True), **parts())
