"""The benchmark suite: statistics, restarts, failures, report."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[1] / 'tools' / 'benchmark_suite.py'

# Logs what mmengine's LoggerHook would; counts how often it was started.
TRAINER = '''
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument('config')
parser.add_argument('--work-dir', type=pathlib.Path)
parser.add_argument('--resume', action='store_true')
parser.add_argument('--cfg-options', nargs='+')
args = parser.parse_args()
seed = int(args.cfg_options[0].split('=')[1])
method = pathlib.Path(args.config).stem
with open(pathlib.Path(__file__).parent / 'starts.txt', 'a') as file:
    file.write(f'{method} {seed} {args.resume} '
               f"{os.environ['OMP_NUM_THREADS']}\\n")
if method == 'broken':
    print('the trainer says why')
    sys.exit(3)
folder = args.work_dir / ('2' if args.resume else '1') / 'vis_data'
folder.mkdir(parents=True)
gain = dict(source_only=0, dacs=3 + seed, unvalidated=0)[method]
log = []
for i, t in zip((1, 2, 3, 4), (9., .2, .3, .4)):
    log.append(dict(iter=i, step=i, time=t, loss=1.))
    if i in (2, 4) and not (i == 4 and method == 'unvalidated'):
        # the best validation is not the last one
        peak = 20 if i == 2 else 0
        val = {'mIoU': 30. + seed + gain + peak, 'IoU.road': 60. + gain,
               'IoU.sky': 10., 'time': 7., 'step': i}
        if method == 'dacs':
            val.update({'teacher/mIoU': 40. + seed, 'teacher/IoU.road': 61.})
        log.append(val)
(folder / 'scalars.json').write_text('\\n'.join(map(json.dumps, log)))
'''


@pytest.fixture(scope='module')
def suite():
    spec = importlib.util.spec_from_file_location('benchmark_suite', TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(tmp_path):
    """A config folder with one pair, and a trainer that trains nothing."""
    pair = tmp_path / 'configs' / 'day2dusk'
    pair.mkdir(parents=True)
    for method in ('source_only', 'dacs'):
        (pair / f'{method}.py').write_text(
            'train_cfg = dict(max_iters=4)\n'
            f'work_dir = "{tmp_path}"\nrandomness = dict(seed=7)\n')
    (tmp_path / 'trainer.py').write_text(TRAINER)
    return tmp_path


def run_suite(suite, place, *extra):
    return suite.main([
        '--configs', str(place / 'configs'), '--out', str(place / 'out'),
        '--results', str(place / 'docs' / 'benchmarks'), '--trainer',
        shlex.join([sys.executable, str(place / 'trainer.py')]),
        '--jobs', '2', *extra
    ])


def starts(place):
    path = place / 'starts.txt'
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_mean_and_sample_standard_deviation(suite):
    assert suite.mean_sd([1., 2., 6.]) == (3., pytest.approx(7**0.5))
    assert suite.mean_sd([4.]) == (4., None)


def test_paired_difference_and_bootstrap(suite):
    method = {0: 33., 1: 36., 2: 38.5, 9: 90.}
    baseline = {0: 30., 1: 31., 2: 38., 5: 1.}
    mean, low, high, count = suite.paired_difference(method, baseline)
    differences = [3., 5., 0.5]
    assert mean == pytest.approx(8.5 / 3) and count == 3
    rng = np.random.default_rng(0)
    means = []
    for row in rng.integers(3, size=(10_000, 3)):
        means.append(sum(differences[i] for i in row) / 3)
    means.sort()
    # the percentile of n values sits at (n - 1) * p of the sorted ones
    for value, p in ((low, 0.025), (high, 0.975)):
        at = 9_999 * p
        left, part = int(at), at - int(at)
        assert value == pytest.approx(
            means[left] * (1 - part) + means[left + 1] * part)
    assert 0.5 <= low < mean < high <= 5.


def test_paired_difference_with_too_few_seeds(suite):
    assert suite.paired_difference({0: 3.}, {0: 1.}) == (2., None, None, 1)
    mean, low, high, count = suite.paired_difference({0: 3.}, {1: 1.})
    assert np.isnan(mean) and (low, high, count) == (None, None, 0)


def test_results_come_from_the_last_validation(suite, place):
    assert run_suite(suite, place, '--seeds', '0', '1', '2') == 0
    result = json.loads(
        (place / 'out/day2dusk/dacs/seed1.json').read_text())
    assert result['mIoU'] == 35. and result['iterations'] == 4
    assert result['IoU'] == {'road': 64., 'sky': 10.}
    assert result['teacher'] == {'mIoU': 41., 'IoU': {'road': 61.}}
    assert result['sec_per_iter'] == pytest.approx(0.35)
    assert result['curve'] == [[2, 55., 41.], [4, 35., 41.]]
    assert result['peak_memory_mb'] > 1 and result['cuda_memory_mb'] is None
    assert result['command'] == (
        'python tools/train.py configs/benchmarks/day2dusk/dacs.py '
        '--work-dir work_dirs/benchmarks/day2dusk/dacs/seed1 '
        '--cfg-options randomness.seed=1')
    assert result['versions']['torch'] and result['versions']['python']
    assert str(place) not in json.dumps(result)
    source = json.loads(
        (place / 'out/day2dusk/source_only/seed1.json').read_text())
    assert source['teacher'] is None
    copy = place / 'docs/benchmarks/results/day2dusk/dacs/seed1.json'
    assert json.loads(copy.read_text()) == result


def test_threads_are_shared_among_jobs(suite, place, monkeypatch):
    monkeypatch.setattr(suite.os, 'cpu_count', lambda: 7)
    run_suite(suite, place, '--seeds', '0')
    assert starts(place) == ['dacs 0 False 3', 'source_only 0 False 3']


def test_report_of_three_seeds(suite, place):
    run_suite(suite, place, '--seeds', '0', '1', '2')
    text = (place / 'docs/benchmarks.md').read_text()
    # source_only 30 31 32; dacs 33 35 37; differences 3 4 5
    assert '| source_only | 0, 1, 2 | 31.00 ± 1.00 | – | – | 0.350 |' in text
    rng = np.random.default_rng(0)
    means = np.array([3., 4., 5.])[rng.integers(3, size=(10_000, 3))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert ('| dacs | 0, 1, 2 | 35.00 ± 2.00 | 41.00 ± 1.00 | '
            f'+4.00 [{low:+.2f}, {high:+.2f}] |') in text
    assert '| road | 60.00 | 64.00 | +4.00 |' in text
    assert '| sky | 10.00 | 10.00 | +0.00 |' in text
    assert 'Only 3 seed(s)' in text
    assert str(place) not in text
    for name in ('day2dusk.png', 'day2dusk_curves.png'):
        assert f'![day2dusk](benchmarks/{name})' in text
        picture = place / 'docs/benchmarks' / name
        assert 1_000 < picture.stat().st_size < 150_000


def test_finished_runs_are_kept(suite, place, capsys):
    run_suite(suite, place, '--seeds', '0', '--methods', 'dacs')
    run_suite(suite, place, '--seeds', '0', '1')
    assert [line[:-8] for line in starts(place)] == [
        'dacs 0', 'dacs 1', 'source_only 0', 'source_only 1']
    assert 'config has changed' not in capsys.readouterr().out
    config = place / 'configs/day2dusk/dacs.py'
    config.write_text(config.read_text() + 'lr = 1\n')
    run_suite(suite, place, '--seeds', '0')
    assert len(starts(place)) == 4
    assert ('day2dusk/dacs seed 0: kept, although its config has changed'
            in capsys.readouterr().out)
    run_suite(suite, place, '--seeds', '0', '--methods', 'dacs', '--force')
    assert len(starts(place)) == 5


def test_hash_ignores_seed_and_work_dir_alone(suite, place):
    config = place / 'configs/day2dusk/dacs.py'
    run = suite.find_runs(place / 'configs', place, None, ['dacs'], [0], [])[0]
    first = run.config_hash()
    config.write_text('train_cfg = dict(max_iters=4)\nwork_dir = "x"\n'
                      'randomness = dict(seed=8)\n')
    assert run.config_hash() == first
    run.options = ['train_cfg.max_iters=5']
    assert run.config_hash() != first
    assert run.resolved()['train_cfg']['max_iters'] == 5


def test_killed_run_resumes_or_starts_clean(suite, place):
    run = suite.find_runs(place / 'configs', place / 'out', None, ['dacs'],
                          [0], [])[0]
    run.work_dir.mkdir(parents=True)
    (run.work_dir / 'rest').write_text('of a killed run')
    run_suite(suite, place, '--seeds', '0', '--methods', 'dacs')
    assert starts(place) == ['dacs 0 False ' + starts(place)[0][-1]]
    assert not (run.work_dir / 'rest').exists()

    run.result.unlink()  # killed, with a checkpoint of the same config
    (run.work_dir / 'last_checkpoint').write_text('iter_2.pth')
    run_suite(suite, place, '--seeds', '0', '--methods', 'dacs')
    assert starts(place)[-1].startswith('dacs 0 True')
    assert json.loads(run.result.read_text())['resumed'] is True

    run.result.unlink()  # a checkpoint of another config is no start
    (run.work_dir / 'last_checkpoint').write_text('iter_2.pth')
    run.config.write_text(run.config.read_text() + 'lr = 1\n')
    run_suite(suite, place, '--seeds', '0', '--methods', 'dacs')
    assert [s.split()[2] for s in starts(place)] == ['False', 'False', 'True']


def test_a_failing_run_does_not_stop_the_others(suite, place, capsys):
    for method in ('broken', 'unvalidated'):
        (place / f'configs/day2dusk/{method}.py').write_text(
            'train_cfg = dict(max_iters=4)\n')
    assert run_suite(suite, place, '--seeds', '0') == 1
    finished = {p.parent.name for p in (place / 'out').glob('*/*/*.json')}
    assert finished == {'dacs', 'source_only'}
    log = place / 'out/day2dusk/broken/seed0.log'
    assert log.read_text() == 'the trainer says why\n'
    out = capsys.readouterr().out
    assert f'ended with 3, see {log}' in out
    assert 'no validation at the last iteration (4)' in out
    assert '+3.00' in (place / 'docs/benchmarks.md').read_text()


def test_report_without_baseline_and_without_results(suite, place):
    assert run_suite(suite, place, '--report-only') == 0
    report = place / 'docs/benchmarks.md'
    assert 'No results yet.' in report.read_text()
    run_suite(suite, place, '--seeds', '1', '--methods', 'dacs')
    text = report.read_text()
    assert 'No result of source_only yet' in text
    assert '| dacs | 1 | 35.00 | 41.00 | – |' in text
    assert 'One seed per method' in text


def test_unknown_method_is_named(suite, place):
    with pytest.raises(ValueError, match='--methods dax: .* dacs, source_onl'):
        run_suite(suite, place, '--methods', 'dax')


def test_curves_of_mmengine_logs(tmp_path):
    from mmseg_contrast.engine.curves import plot_curves, read_curve
    path = tmp_path / 'scalars.json'
    lines = [dict(iter=5, step=5, loss=1.), dict(mIoU=10., step=5),
             dict(iter=9, step=9), dict(mIoU=12., step=0)]
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n{"mIoU": 3')
    assert read_curve(path) == ([5, 9], [10., 12.])
    assert read_curve(path, 'teacher/mIoU') == ([], [])
    plot_curves([path, path], ['a', 'a'], tmp_path / 'x' / 'curve.png')
    assert (tmp_path / 'x' / 'curve.png').stat().st_size > 1_000
    with pytest.raises(ValueError, match='1 scalars.json files but 2 labels'):
        plot_curves([path], ['a', 'b'], tmp_path / 'no.png')


def test_the_readme_gets_the_short_table(suite, tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text('\n'.join(
        ['before', suite.README_MARKS[0], 'old', suite.README_MARKS[1],
         'after']))

    def result(value):
        return dict(mIoU=value, teacher=dict(mIoU=value + 1))

    suite.update_readme(readme, dict(pair=dict(
        source_only={0: result(30.), 1: result(32.)},
        dacs={0: result(35.), 1: result(36.)})))
    text = readme.read_text()
    assert 'old' not in text
    assert text.startswith('before\n') and text.endswith('after')
    assert '| pair | dacs | 2 | 35.50 ± 0.71 | 36.50 ± 0.71 | +4.50 ' in text
    once = text
    suite.update_readme(readme, dict(pair=dict(
        source_only={0: result(30.), 1: result(32.)},
        dacs={0: result(35.), 1: result(36.)})))
    assert readme.read_text() == once
    suite.update_readme(tmp_path / 'missing.md', {})
