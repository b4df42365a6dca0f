"""HRDA with MIC and with CLUDA on two ranks: one model, other draws."""

import pytest
import torch
from test_hrda import SIZE, config

from helpers import batch, build, dacs_parts, total
from mmseg_contrast.ops import BoxOfEach
from processes import on_ranks

STEPS = 3
CASES = ['mic', 'mic-halves', 'cluda', 'cluda-published', 'all']


def parts(case):
    """What is added to DACS."""
    found = dacs_parts()
    views, objectives = found['views'], found['objectives']
    if case in ('mic', 'all'):
        views.update(
            target_labelled=dict(type='PseudoLabelled'),
            target_strong=dict(type='StrongAugment', share_order=True,
                               view='target_labelled'),
            masked=dict(type='BlockMask', view='target_strong', block=16))
        objectives['masked'] = dict(type='Segmentation', view='masked')
    if case == 'mic-halves':
        views.update(
            target_labelled=dict(type='PseudoLabelled'),
            halves=dict(type='Halves'),
            masked=dict(type='BlockMask', view='halves', block=16))
        objectives['masked'] = dict(type='Segmentation', view='masked')
    if case in ('cluda', 'cluda-published', 'all'):
        objectives['cluda'] = dict(type='ResolutionContrast', size=8)
    if case in ('cluda-published', 'all'):
        objectives['cluda'].update(
            weighter=dict(channels=4, embed_dims=4), start=1)
        views['mixed_augmented'] = views['mixed_strong']
        views['mixed_strong'] = dict(
            type='UnsureDetail', view='mixed_augmented', start=1)
    return found


def model_of(case):
    model = build(config(), **parts(case))
    model.keep_step = True
    return model


def drawn(model):
    """What the last step has drawn."""
    step = model.last_step
    found = dict(origin=step.view('mixed').extras['origin'])
    for name, one in step.students.items():
        boxes = one.features.boxes
        found[f'{name}.box'] = (boxes.index if isinstance(boxes, BoxOfEach)
                                else torch.tensor(boxes))
    if 'masked' in step.views:
        found['hidden'] = (step.view('masked').images == 0).all(1)
    return found


def run_rank(folder):
    rank, results = torch.distributed.get_rank(), {}
    for case in CASES:
        model = model_of(case)
        # Parameters without a gradient would be an error: none are looked
        # for.
        both = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False)
        assert not both.find_unused_parameters
        optimizer = torch.optim.AdamW(
            [one for one in model.parameters() if one.requires_grad], lr=1e-2)
        draws, grads = [], []
        for seed in range(STEPS):
            # The same data: what differs has been drawn.
            data = batch(SIZE, seed=seed)
            if rank == 1 and seed == 1:  # nothing to learn from here
                for one in data['data_samples']['source']:
                    one.gt_sem_seg.data.fill_(255)
            data = model.data_preprocessor(data, True)
            losses = both(**data, mode='loss')
            optimizer.zero_grad()
            total(losses).backward()
            grads.append({name: one.grad.clone() for name, one in
                          model.named_parameters() if one.requires_grad})
            optimizer.step()
            draws.append(drawn(model))
        results[case] = dict(
            state=model.state_dict(), draws=draws, grads=grads)
    torch.save(results, folder / f'{rank}.pth')


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    on_ranks(run_rank, folder)
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


@pytest.mark.parametrize('case', CASES)
def test_student_teacher_and_weighter_are_the_same(ranks, case):
    one, two = (rank[case]['state'] for rank in ranks)
    before = model_of(case).state_dict()
    assert set(one) == set(before)
    moved = set()
    for key, value in one.items():
        if 'running_' in key:  # of each rank's own batch
            continue
        assert torch.equal(two[key], value), key
        if not torch.equal(before[key], value):
            moved.add(key.rsplit('.', 1)[0])
    for part in ('backbone.convs.0', 'decode_head.head.conv_seg',
                 'decode_head.scale_attention.conv_seg',
                 'teachers.ema.model.backbone.convs.0'):
        assert part in moved
    if 'cluda' in case or case == 'all':
        assert any(part.startswith('objectives.cluda.weighter')
                   for part in moved)


@pytest.mark.parametrize('case', CASES)
def test_gradients_are_the_mean_of_both(ranks, case):
    for step in range(STEPS):
        one, two = (rank[case]['grads'][step] for rank in ranks)
        assert all(torch.equal(two[key], grad) for key, grad in one.items())
    assert all(grad.abs().max() > 0 for key, grad in one.items()
               if key.endswith(('convs.0.weight', 'conv_seg.weight')))


@pytest.mark.parametrize('case', CASES)
def test_draws_differ(ranks, case):
    one, two = (rank[case]['draws'] for rank in ranks)
    assert set(one[0]) == set(two[0])
    for name in one[0]:
        if name == 'mixed_strong.box' and case in ('cluda-published', 'all'):
            # Where the net is unsure is no draw.
            assert one[1][name].shape == (2, )
            continue
        assert any(not torch.equal(mine[name], theirs[name])
                   for mine, theirs in zip(one, two, strict=True)), name
        # And from step to step.
        assert any(not torch.equal(one[0][name], later[name])
                   for later in one[1:]), name
