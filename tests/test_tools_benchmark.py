"""tools/benchmark.py at tiny sizes. No time is asserted."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from mmengine.registry import init_default_scope

from benchmark_tool import (
    arguments,
    call,
    class_statistics,
    columns,
    contrast,
    contrast_step,
    kernel,
    memory,
    timing,
)

TINY = ['anchors=6', 'classes=4', 'length=5', 'channels=3', 'pixels=40',
        'moment_channels=3']


# ------------------------------------------------------------------ measures


def test_a_spread_is_the_median_with_the_quartiles():
    spread = timing.Spread.of([5., 1., 3., 2., 4.])
    assert (spread.median, spread.low, spread.high) == (3., 2., 4.)
    assert spread.text(10., 1) == '30.0 (20.0-40.0)'
    assert timing.Spread.of([7.]) == timing.Spread(7., 7., 7.)


def test_ratios_are_of_the_same_turn():
    # The third turn took five times as long, for both.
    spread = timing.ratios([1., 1., 5.], [2., 2., 10.])
    assert (spread.median, spread.low, spread.high) == (.5, .5, .5)


def test_what_is_compared_runs_in_turns():
    order = []
    timer = timing.Timer('cpu', 2, 'wall')
    seconds = timer.in_turns({
        name: lambda name=name: order.append(name) for name in 'abc'})
    assert ''.join(order) == 'abc' * 3  # the first to warm up
    assert {name: len(one) for name, one in seconds.items()} == dict(
        a=2, b=2, c=2)
    assert all(one >= 0 for times in seconds.values() for one in times)


def test_targets_have_a_direction():
    rows = [dict(name=name, own='energy', keys='live',
                 time_ratio=dict(median=time), peak_ratio=peak)
            for name, time, peak in (
                ('dense autograd', 1., 1.), ('ours, class form', .7, .26),
                ('ours, pair form', .71, None))]
    found = contrast.check_targets(dict(
        device='cpu', kernel=rows,
        moments=[{}, dict(times_faster=dict(median=200.))]))
    assert [(one['target'], one['met']) for one in found] == [
        (.7, True), (.25, False), (.7, False), (200, True)]


# ---------------------------------------------------------- what is compared


def loops(problem, own):
    """The equation, pair by pair."""
    anchors, keys = problem.anchors.detach(), problem.keys.detach()
    total = 0.
    for f, y in zip(anchors, problem.labels.tolist(), strict=True):
        near = [(f @ k).item() / problem.tau for k in keys[y]]
        apart = sum(math.exp((f @ k).item() / problem.tau)
                    for c in range(len(keys)) if c != y for k in keys[c])
        every = sum(math.exp(s) for s in near)
        total += sum(
            math.log((every if own == 'energy' else math.exp(s)) + apart) - s
            for s in near) / len(near)
    return total / len(anchors)


@pytest.mark.parametrize('live', [False, True])
@pytest.mark.parametrize('own', ['positive', 'energy'])
def test_all_ways_compute_the_same_loss(own, live):
    sizes = arguments.read_sizes(TINY, kernel.Sizes)
    problem = kernel.make_problem(sizes, live, 'cpu')
    want = kernel.with_gradients(kernel.dense, problem, own)
    assert want[0].item() == pytest.approx(loops(problem, own), rel=1e-5)
    assert len(want) == 2 + live
    for name, loss in kernel.LOSSES.items():
        if name == kernel.LIBRARY and not (own == 'energy'
                                           and kernel.has_library()):
            continue
        got = kernel.with_gradients(loss, problem, own)
        assert kernel.difference(got, want) < 1e-5, name


def test_a_difference_is_seen():
    one = torch.tensor([2., -4.])
    assert kernel.difference([one, one + .4], [one, one]) == pytest.approx(.1)


def test_both_class_statistics_are_the_same():
    features, labels = class_statistics.make_pixels(
        arguments.read_sizes(TINY, kernel.Sizes), 'cpu')
    assert (labels == 255).sum() == 2
    got = class_statistics.MOMENTS['ours'](features, labels, 4)
    want = class_statistics.MOMENTS['N x C x D'](features, labels, 4)
    mean = features[labels == 1].mean(0)
    assert torch.allclose(want[1][1], mean)
    assert torch.allclose(
        want[2][1], (features[labels == 1] - mean).square().sum(0))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.float(), b, atol=1e-5)


def test_the_peak_is_that_of_a_process_of_its_own():
    sizes = kernel.Sizes(anchors=512, classes=4, length=2500, channels=2)
    matrix = 4 * 512 * 10000
    peak = memory.peak_in_new_process(dict(
        part='kernel', name=kernel.BASELINE, own='energy', live=False,
        device='cpu', sizes=asdict(sizes)))
    assert 3 * matrix < peak < 10 * matrix


def test_statistics_that_do_not_fit_are_of_less_pixels(monkeypatch):
    monkeypatch.setattr(class_statistics, 'available_memory', lambda device: (
        5 * 4 * 20 * 4 * 3))
    rows = class_statistics.measure_moments(
        arguments.read_sizes(TINY, kernel.Sizes),
        timing.Timer('cpu', 1, 'wall'), memory=False)
    assert [row['pixels'] for row in rows] == [20, 20]


# ------------------------------------------------------------------- command


def test_tables_and_json_come_out(monkeypatch, capsys, tmp_path):
    path = tmp_path / 'out.json'
    call(monkeypatch, 'contrast', '--sizes', *TINY, '--repeats', 2,
         '--no-memory', '--threads', 1, '--clock', 'process', '--json', path)
    result = json.loads(path.read_text())
    assert result['sizes']['anchors'] == 6 and result['threads'] == 1
    assert result['clock'] == 'process' and result['repeats'] == 2

    rows = result['kernel']
    library = kernel.has_library()
    assert len(rows) == 2 * (4 + 4 + library)
    assert {(row['own'], row['keys']) for row in rows} == {
        (own, keys) for own in ('positive', 'energy')
        for keys in ('detached', 'live')}
    for row in rows:
        assert row['difference'] < 1e-4 and row['peak'] is None
        assert 0 <= row['seconds']['low'] <= row['seconds']['median']
        assert row['seconds']['median'] <= row['seconds']['high']
        if row['name'] == kernel.BASELINE:
            assert row['difference'] == 0

    ours = result['moments'][1]
    assert (ours['name'], ours['pixels']) == ('ours', 40)
    assert ours['features'] == 40 * 3 * 4 and ours['difference'] < 1e-5

    growth = result['growth']
    assert [(row['anchors'], row['keys']) for row in growth] == [
        (2, 20), (6, 20), (24, 20), (6, 4), (6, 20), (6, 80)]
    for row in growth:
        assert row['per_pair']['median'] * row['anchors'] * row[
            'keys'] == pytest.approx(row['seconds']['median'])
    assert len(result['targets']) == 8 + 1

    printed = capsys.readouterr().out
    lines = [columns(line) for line in printed.splitlines()
             if line.startswith('|')]
    heads = [i for i, line in enumerate(lines) if set(line) == {'---'}]
    assert len(heads) == 4
    assert len(lines) == 2 * 4 + len(rows) + 2 + 6 + 9
    row = lines[heads[0] + 1]
    assert row[:3] == ['positive', 'detached', kernel.BASELINE]


@pytest.mark.parametrize('args, message', [
    (['contrast', '--sizes', 'anchor=3'], '--sizes anchor=3 must be'),
    (['contrast', '--sizes', 'anchors=x'], '--sizes anchors=x must be'),
    (['contrast', '--sizes', 'anchors=0'], 'anchors=0 must be above 0'),
    (['contrast-step', '--sizes', 'anchors=3'], 'side, samples, classes'),
    (['contrast-step', '--methods', 'none'], 'known are '),
    (['contrast', '--sync-check'], '--sync-check needs --device cuda'),
    (['contrast', '--repeats', '0'], 'must be at least 1'),
])
def test_mistakes_are_named(monkeypatch, capsys, args, message):
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, *args)
    assert message in str(error.value) + capsys.readouterr().err


# -------------------------------------------------------------- a whole step


def test_parts_of_a_step_are_those_of_the_method(monkeypatch):
    init_default_scope('mmseg')
    training = contrast_step.Training(
        'sepico-dist@6',
        contrast_step.StepSizes(side=64, samples=1, classes=4), 'cpu')
    head = training.model.segmentor.auxiliary_head[0]
    parts = contrast_step.Parts(training)
    assert {name: len(calls) for name, calls in parts.calls.items()} == dict(
        pixels=3, contrast=2, update_bank=1, project=3)
    # Source and target of the student, and the teacher's source.
    assert [any(one.requires_grad for one in features) for _, (features, ), _
            in parts.calls['project']] == [False, True, True]
    pixels = parts.calls['contrast'][0][1][0]
    assert pixels.embeddings.shape == (1, 6, 16, 16)
    assert pixels.embeddings.is_leaf and pixels.embeddings.requires_grad
    for name in parts.calls:  # nothing is recorded any more
        assert name not in vars(head)

    seen = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad', lambda *args, **kwargs: (
        seen.append(original(*args, **kwargs)), seen[-1])[1])
    count = head.bank.count.clone()
    for function in parts.functions().values():
        function()
    assert (head.bank.count > count).any()
    # Two losses and two projections, the teacher's has no backward.
    assert len(seen) == 4
    assert seen[0][0].shape == (1, 6, 16, 16)


def test_the_table_of_a_step(monkeypatch, capsys, tmp_path):
    path = tmp_path / 'step.json'
    call(monkeypatch, 'contrast-step', '--methods', 'sepico-proto@6',
         'sdca', '--sizes', 'side=64', 'samples=1', 'classes=4', '--repeats',
         1, '--json', path)
    dacs, proto, sdca = json.loads(path.read_text())['step']
    assert dacs['passes'] == dict(student=2, teacher=1)
    assert proto['extra_passes'] == dict(student=1, teacher=1)
    assert sdca['extra_passes'] == dict(student=1, teacher=0)
    for row in (proto, sdca):
        share = {name: one['median'] for name, one in row['shares'].items()}
        assert sum(share[name] for name in (
            'labels', 'sampler', 'bank', 'kernel')) == pytest.approx(
                share['together'])
        whole = row['seconds']['median'] / dacs['seconds']['median']
        assert 1 + share['together'] + share['projection'] + share[
            'rest'] == pytest.approx(whole)
    lines = [columns(line) for line in capsys.readouterr().out.splitlines()
             if line.startswith('| sepico-proto@6')]
    assert lines[0][-1] == '1 student, 1 teacher'
