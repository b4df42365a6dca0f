"""Run benchmark configs over seeds and write the report of what came out.

A run is ``configs/benchmarks/<pair>/<method>.py`` with one seed. Its result,
taken from the validation at the last iteration (never the best one), is kept
as one JSON; a run that has its JSON is not repeated. The report and its plots
are made from these JSONs alone.

    python tools/benchmark_suite.py --pairs camvid_day2dusk --seeds 0 1 2
    python tools/benchmark_suite.py --report-only
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.logging import print_log

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package of this tree, installed or not

BASELINE = 'source_only'
README_MARKS = ('<!-- results: written by tools/benchmark_suite.py -->',
                '<!-- /results -->')
THREAD_VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS',
                    'OPENBLAS_NUM_THREADS', 'NUMEXPR_NUM_THREADS')
DISTRIBUTIONS = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmcv-lite',
                 'mmsegmentation', 'onedl-mmengine', 'onedl-mmcv',
                 'onedl-mmsegmentation', 'mmseg_contrast')

# ---------------------------------------------------------------- statistics


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), sd


def paired_difference(
        method: dict[int, float],
        baseline: dict[int, float],
        resamples: int = 10_000,
        level: float = 0.95) -> tuple[float, float | None, float | None, int]:
    """Mean difference over common seeds, with its bootstrap interval.

    Args:
        method (dict[int, float]): Value of every seed.
        baseline (dict[int, float]): Value of every seed of the baseline.
        resamples (int): Number of bootstrap samples, drawn from the seeds.
        level (float): Coverage of the percentile interval.

    Returns:
        tuple: Mean, lower and upper end (None with fewer than two common
        seeds), number of common seeds. The mean is nan when there are none.
    """
    seeds = sorted(set(method) & set(baseline))
    if not seeds:
        return float('nan'), None, None, 0
    differences = np.array([method[s] - baseline[s] for s in seeds])
    if len(seeds) < 2:
        return float(differences.mean()), None, None, len(seeds)
    draws = np.random.default_rng(0).integers(
        len(seeds), size=(resamples, len(seeds)))
    tail = 50 * (1 - level)
    low, high = np.percentile(
        differences[draws].mean(axis=1), [tail, 100 - tail])
    return float(differences.mean()), float(low), float(high), len(seeds)


# ---------------------------------------------------------------------- runs


@dataclass
class Run:
    """One benchmark config with one seed.

    Args:
        pair (str): Folder of the config.
        method (str): Name of the config file.
        seed (int): Seed of the run.
        config (Path): The config file.
        out (Path): Folder of all results.
        options (list[str]): Further ``key=value`` for ``--cfg-options``.
    """

    pair: str
    method: str
    seed: int
    config: Path
    out: Path
    options: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f'{self.pair}/{self.method} seed {self.seed}'

    @property
    def relative(self) -> Path:
        """Where its JSON lies, in any folder of results."""
        return Path(self.pair, self.method, f'seed{self.seed}.json')

    @property
    def result(self) -> Path:
        """The JSON that says that it is finished."""
        return self.out / self.relative

    @property
    def work_dir(self) -> Path:
        """Folder of logs and checkpoints."""
        return self.result.with_suffix('')

    @property
    def log(self) -> Path:
        """Everything that the trainer wrote to the terminal."""
        return self.result.with_suffix('.log')

    @property
    def cfg_options(self) -> list[str]:
        """What ``--cfg-options`` gets."""
        return [f'randomness.seed={self.seed}', *self.options]

    @property
    def command(self) -> str:
        """The command as a user types it at the root of the project."""
        work_dir = Path('work_dirs', 'benchmarks', self.relative)
        return shlex.join([
            'python', 'tools/train.py',
            f'configs/benchmarks/{self.pair}/{self.method}.py', '--work-dir',
            work_dir.with_suffix('').as_posix(), '--cfg-options',
            *self.cfg_options
        ])

    def resolved(self) -> dict[str, Any]:
        """The whole config with the options, without seed and work dir."""
        config = Config.fromfile(
            str(self.config), import_custom_modules=False)
        if self.options:
            parser = argparse.ArgumentParser()
            parser.add_argument('--cfg-options', nargs='+', action=DictAction)
            options = parser.parse_args(['--cfg-options', *self.options])
            config.merge_from_dict(options.cfg_options)
        resolved = config.to_dict()
        resolved.pop('work_dir', None)
        if isinstance(resolved.get('randomness'), dict):
            resolved['randomness'].pop('seed', None)
            if not resolved['randomness']:
                del resolved['randomness']
        return resolved

    def config_hash(self) -> str:
        """Short hash of the resolved config."""
        text = json.dumps(self.resolved(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_runs(configs: Path, out: Path, pairs: list[str] | None,
              methods: list[str] | None, seeds: list[int],
              options: list[str]) -> list[Run]:
    """All runs asked for, one seed of everything before the next seed.

    Raises:
        ValueError: If a pair or a method has no config.
    """
    found = {(path.parent.name, path.stem): path
             for path in sorted(configs.glob('*/*.py'))
             if not path.name.startswith('_')
             and not path.parent.name.startswith('_')}
    for flag, wanted, known in (('--pairs', pairs, {p for p, _ in found}),
                                ('--methods', methods,
                                 {m for _, m in found})):
        for name in wanted or []:
            if name not in known:
                raise ValueError(
                    f'{flag} {name}: {configs.name}/ has no such config, '
                    f'only {", ".join(sorted(known)) or "none at all"}.')
    chosen = [(pair, method) for pair, method in found
              if (not pairs or pair in pairs)
              and (not methods or method in methods)]
    return [
        Run(pair, method, seed, found[pair, method], out, options)
        for seed in seeds for pair, method in chosen
    ]


def read_records(work_dir: Path) -> list[dict[str, Any]]:
    """Records of mmengine's ``scalars.json`` of all starts, oldest first."""
    records = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # cut off when the run was killed
                continue
    return records


def scores(record: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """MIoU and IoU of every class from one validation record."""
    if f'{prefix}mIoU' not in record:
        return None
    start = f'{prefix}IoU.'
    return dict(
        # mmseg rounds to two digits in float32, which JSON writes as noise
        mIoU=round(record[f'{prefix}mIoU'], 2),
        IoU={
            key[len(start):]: round(value, 2)
            for key, value in record.items() if key.startswith(start)
        })


def measured(work_dir: Path, max_iters: int | None) -> dict[str, Any]:
    """What a finished run logged: the part of the result that it measured.

    Args:
        work_dir (Path): Folder of the run.
        max_iters (int, optional): Iterations that the config asks for.

    Raises:
        ValueError: If there is no validation at the last iteration.
    """
    curve: dict[int, dict[str, Any]] = {}
    times: dict[int, float] = {}
    memory = []
    trained = 0
    for record in read_records(work_dir):
        if 'iter' in record:  # only the training log has it
            trained = record['iter']
            if 'time' in record:
                times[trained] = record['time']
            if 'memory' in record:
                memory.append(record['memory'])
            continue
        prefix = 'student/' if 'student/mIoU' in record else ''
        student = scores(record, prefix)
        if student is not None:
            # `step` is the epoch when log_metric_by_epoch=True
            step = max(int(record.get('step', 0)), trained)
            curve[step] = dict(student=student,
                               teacher=scores(record, 'teacher/'))
    last = max(curve, default=0)
    wanted = trained if max_iters is None else max_iters
    if not curve or last < wanted:
        raise ValueError(
            f'no validation at the last iteration ({wanted}) was logged; the '
            'last one is at '
            f'{last if curve else "none"} (train_cfg.val_interval).')
    teacher = curve[last]['teacher']
    return dict(
        mIoU=curve[last]['student']['mIoU'],
        IoU=curve[last]['student']['IoU'],
        teacher=teacher,
        iterations=last,
        sec_per_iter=(round(statistics.median(times.values()), 4)
                      if times else None),
        cuda_memory_mb=max(memory) if memory else None,
        curve=[[step, point['student']['mIoU'],
                point['teacher']['mIoU'] if point['teacher'] else None]
               for step, point in sorted(curve.items())])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, as far as installed."""
    found = {'python': platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the tree, marked when code or configs differ from it."""
    try:
        commit = subprocess.run(
            ['git', 'rev-parse', '--short=12', 'HEAD'], cwd=ROOT, check=True,
            capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(
            ['git', 'status', '--porcelain', '--', 'mmseg_contrast',
             'configs', 'tools'], cwd=ROOT, check=True, capture_output=True,
            text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit} with changes' if changed else commit


class Runner:
    """Runs a list of runs, several processes at a time.

    Args:
        trainer (list[str]): Command that trains; config and flags follow.
        jobs (int): Processes at a time.
        force (bool): Whether finished runs are repeated.
    """

    def __init__(self, trainer: list[str], jobs: int, force: bool) -> None:
        self.trainer = trainer
        self.jobs = jobs
        self.force = force
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.children: dict[int, subprocess.Popen] = {}
        self.lock = threading.Lock()
        self.stopped = False
        self.done = 0
        self.commit = git_commit()

    def run_all(self, runs: list[Run]) -> list[tuple[Run, str]]:
        """Do all runs; those that failed come back with the reason."""
        failures = []
        waiting = []
        for run in runs:
            if run.result.is_file() and not self.force:
                self.check_kept(run)
            else:
                waiting.append(run)
        print_log(f'{len(runs)} runs, {len(runs) - len(waiting)} finished '
                  f'before, {self.jobs} at a time, {self.threads} thread(s) '
                  'each')
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [(run, pool.submit(self.run_one, run, len(waiting)))
                       for run in waiting]
            try:
                for run, future in futures:
                    error = future.exception()
                    if error is not None:
                        failures.append((run, str(error)))
            except KeyboardInterrupt:
                self.stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failures

    def check_kept(self, run: Run) -> None:
        """Say so when a finished run was made by another config."""
        kept = json.loads(run.result.read_text())['config_hash']
        try:
            changed = kept != run.config_hash()
        except Exception as error:  # a config broken since; its result isn't
            print_log(f'{run.name}: kept; its config fails now: {error}')
            return
        if changed:
            print_log(f'{run.name}: kept, although its config has changed '
                      'since (--force repeats it)')

    def run_one(self, run: Run, total: int) -> None:
        """Do one run and write its JSON."""
        try:
            result = self.train(run)
            temporary = run.result.with_suffix('.tmp')
            temporary.write_text(json.dumps(result, indent=1) + '\n')
            temporary.replace(run.result)
            line = f'mIoU {result["mIoU"]:.2f}'
            if result['teacher']:
                line += f', teacher {result["teacher"]["mIoU"]:.2f}'
            line += f', {result["wall_s"]:.0f} s'
        except Exception as error:
            line = f'FAILED: {error}'
            raise
        finally:
            with self.lock:
                self.done += 1
                print_log(f'[{self.done}/{total}] {run.name}: {line}')

    def train(self, run: Run) -> dict[str, Any]:
        """Train in a clean folder, or go on from a checkpoint there."""
        with self.lock:  # mmengine's config reader is not made for threads
            resolved = run.resolved()
            config_hash = run.config_hash()
        mark = run.work_dir / 'config_hash'
        resume = (not self.force
                  and (run.work_dir / 'last_checkpoint').is_file()
                  and mark.is_file() and mark.read_text() == config_hash)
        max_iters = resolved.get('train_cfg', {}).get('max_iters')
        while True:
            if not resume and run.work_dir.exists():
                shutil.rmtree(run.work_dir)
            run.work_dir.mkdir(parents=True, exist_ok=True)
            mark.write_text(config_hash)
            wall_s, peak_mb = self.spawn(run, resume)
            try:
                found = measured(run.work_dir, max_iters)
                break
            except ValueError:
                # Killed between the last checkpoint and the validation.
                if not resume:
                    raise
                resume = False
        return dict(
            pair=run.pair,
            method=run.method,
            seed=run.seed,
            **found,
            peak_memory_mb=round(peak_mb, 1),
            wall_s=round(wall_s, 1),
            resumed=resume,
            threads=self.threads,
            jobs=self.jobs,
            command=run.command,
            config_hash=config_hash,
            commit=self.commit,
            versions=versions(),
            date=time.strftime('%Y-%m-%d', time.gmtime()))

    def spawn(self, run: Run, resume: bool) -> tuple[float, float]:
        """One process of the trainer; its seconds and peak memory in MB.

        Raises:
            RuntimeError: If it ends with an error.
        """
        command = [
            *self.trainer, str(run.config), '--work-dir', str(run.work_dir),
            *(['--resume'] if resume else []), '--cfg-options',
            *run.cfg_options
        ]
        environment = dict(os.environ)
        environment.update(
            {name: str(self.threads) for name in THREAD_VARIABLES})
        environment['PYTHONPATH'] = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        started = time.monotonic()
        with open(run.log, 'a' if resume else 'w') as log:
            with self.lock:
                if self.stopped:
                    raise RuntimeError('stopped')
                child = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    start_new_session=True)
                self.children[child.pid] = child
            # wait4 gives the memory of this child (and its workers) alone
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            del self.children[child.pid]
        if child.returncode != 0:
            raise RuntimeError(
                f'the trainer ended with {child.returncode}, see {run.log}')
        unit = 2**20 if sys.platform == 'darwin' else 2**10
        return time.monotonic() - started, usage.ru_maxrss / unit

    def stop(self) -> None:
        """End the processes that run now, with their loader workers."""
        with self.lock:
            self.stopped = True
            for pid in self.children:
                try:
                    os.killpg(pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue


# -------------------------------------------------------------------- report

Results = dict[str, dict[str, dict[int, dict[str, Any]]]]


def load_results(folder: Path) -> Results:
    """All JSONs below a folder as ``results[pair][method][seed]``."""
    results: Results = {}
    for path in sorted(folder.glob('*/*/seed*.json')):
        result = json.loads(path.read_text())
        methods = results.setdefault(result['pair'], {})
        methods.setdefault(result['method'], {})[result['seed']] = result
    for pair, methods in results.items():  # the baseline comes first
        results[pair] = dict(sorted(
            methods.items(), key=lambda item: (item[0] != BASELINE, item[0])))
    return results


def spread(values: list[float]) -> str:
    """``mean ± sd`` as text."""
    if not values:
        return '–'
    mean, sd = mean_sd(values)
    return f'{mean:.2f}' if sd is None else f'{mean:.2f} ± {sd:.2f}'


def student_scores(seeds: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Student's mIoU of every seed."""
    return {seed: result['mIoU'] for seed, result in seeds.items()}


def class_scores(seeds: dict[int, dict[str, Any]],
                 name: str) -> dict[int, float]:
    """Student's IoU of one class for the seeds that have it."""
    return {seed: result['IoU'][name] for seed, result in seeds.items()
            if name in result['IoU']}


def class_names(methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """All classes of a pair in the order in which they were logged."""
    names: dict[str, None] = {}
    for seeds in methods.values():
        for result in seeds.values():
            names.update(dict.fromkeys(result['IoU']))
    return list(names)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, first column to the left."""
    return [
        '| ' + ' | '.join(header) + ' |',
        '|---' + '|---:' * (len(header) - 1) + '|',
        *('| ' + ' | '.join(row) + ' |' for row in rows), ''
    ]


def difference_text(methods: dict[str, dict[int, dict[str, Any]]],
                    method: str) -> str:
    """Paired difference to the baseline with its interval, as text."""
    baseline = student_scores(methods.get(BASELINE, {}))
    if method == BASELINE or not baseline:
        return '–'
    mean, low, high, count = paired_difference(
        student_scores(methods[method]), baseline)
    if not count:
        return '–'
    interval = '' if low is None else f' [{low:+.2f}, {high:+.2f}]'
    return f'{mean:+.2f}{interval}'


def summary_table(methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """One line per method: mIoU, difference to the baseline, cost."""
    rows = []
    for method, seeds in methods.items():
        results = list(seeds.values())
        teacher = [r['teacher']['mIoU'] for r in results if r['teacher']]
        times = [r['sec_per_iter'] for r in results if r['sec_per_iter']]
        cuda = [r['cuda_memory_mb'] for r in results if r['cuda_memory_mb']]
        memory = f'{max(r["peak_memory_mb"] for r in results):.0f}'
        if cuda:
            memory += f' (GPU {max(cuda):.0f})'
        rows.append([
            method, ', '.join(str(s) for s in sorted(seeds)),
            spread([r['mIoU'] for r in results]), spread(teacher),
            difference_text(methods, method),
            f'{statistics.median(times):.3f}' if times else '–', memory
        ])
    return table([
        'Method', 'Seeds', 'Student mIoU', 'Teacher mIoU',
        f'Difference to {BASELINE}', 's/it', 'Peak MB (trainer)'
    ], rows)


def class_table(methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """One line per class: mean IoU of every method, and the differences."""
    others = [m for m in methods if m != BASELINE and BASELINE in methods]
    rows = []
    for name in class_names(methods):
        row = [name]
        for seeds in methods.values():
            values = list(class_scores(seeds, name).values())
            row.append(f'{np.mean(values):.2f}' if values else '–')
        for method in others:
            mean, _, _, count = paired_difference(
                class_scores(methods[method], name),
                class_scores(methods[BASELINE], name))
            row.append(f'{mean:+.2f}' if count else '–')
        rows.append(row)
    return table(['Class', *methods, *(f'Δ {m}' for m in others)], rows)


def notes(methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """What a reader of the tables has to know."""
    lines = []
    counts = sorted({len(seeds) for seeds in methods.values()})
    if counts[-1] == 1:
        lines.append('One seed per method: nothing can be said of the spread.')
    elif counts[0] < 5:
        few = ' to '.join(str(c) for c in dict.fromkeys(
            [counts[0], counts[-1]]))
        lines.append(
            f'Only {few} seed(s) per method: a bootstrap over so few values '
            'cannot reach beyond the smallest and the largest difference '
            'seen, so the interval is narrower than its nominal 95% and says '
            'how much the seeds disagree, not how sure the result is.')
    if BASELINE not in methods:
        lines.append(f'No result of {BASELINE} yet, hence no differences.')
    mixed = [m for m, seeds in methods.items()
             if len({r['config_hash'] for r in seeds.values()}) > 1]
    if mixed:
        lines.append('**The seeds of these methods were made by different '
                     f'configs:** {", ".join(mixed)}.')
    return [part for line in lines for part in (line, '')]


def report(results: Results, plots: dict[str, list[str]]) -> str:
    """The whole report as Markdown.

    Args:
        results (dict): ``results[pair][method][seed]``.
        plots (dict[str, list[str]]): Pictures of every pair, as the report
            links them.
    """
    lines = [
        '# Benchmarks', '',
        '<!-- Made by tools/benchmark_suite.py --report-only. Edits get lost. '
        '-->', '',
        'mIoU in percent on the test set of the target, at the last '
        'iteration. Mean ± standard deviation over seeds; the difference is '
        'paired by seed, with the 95% interval of a bootstrap over seeds '
        '(10,000 resamples). Made from the JSON files under '
        '`docs/benchmarks/results` by', '', '    python '
        'tools/benchmark_suite.py --report-only', ''
    ]
    if not results:
        lines += ['No results yet.', '']
    for pair, methods in results.items():
        lines += [f'## {pair}', '', *summary_table(methods), *notes(methods)]
        for plot in plots.get(pair, []):
            lines += [f'![{pair}]({plot})', '']
        lines += ['IoU per class, mean over seeds:', '',
                  *class_table(methods),
                  'Commands, for the first seed of each:', '']
        for seeds in methods.values():
            lines.append('    ' + seeds[min(seeds)]['command'])
        lines += ['', 'All seeds:', '',
                  f'    python tools/benchmark_suite.py --pairs {pair}', '']
        lines += provenance(methods)
    return '\n'.join(lines).rstrip() + '\n'


def provenance(methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Versions and commits behind the numbers of a pair."""
    where: dict[str, list[str]] = {}
    for method, seeds in methods.items():
        for seed, result in sorted(seeds.items()):
            text = ', '.join(f'{k} {v}'
                             for k, v in result['versions'].items())
            text += f'; commit {result["commit"] or "unknown"}'
            text += (f'; {result["iterations"]} iterations, '
                     f'{result["threads"]} thread(s)')
            where.setdefault(text, []).append(f'{method} {seed}')
    if len(where) == 1:
        return ['Versions: ' + next(iter(where)) + '.', '']
    return ['Versions:', '',
            *(f'- {", ".join(runs)}: {text}.' for text, runs in where.items()),
            '']


def plot_pair(methods: dict[str, dict[int, dict[str, Any]]], pair: str,
              path: Path) -> None:
    """Dots of all seeds, and bars per class, as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mmseg_contrast.engine.curves import distinct_colors
    names = class_names(methods)
    figure = Figure(
        figsize=(max(8, 0.8 * len(names), 0.8 * len(methods)), 7), dpi=85)
    FigureCanvasAgg(figure)
    dots, bars = figure.subplots(2, 1)
    colors = distinct_colors(len(methods))
    for at, (method, seeds) in enumerate(methods.items()):
        color = colors[at]
        for shift, marker, label, values in (
                (-0.08, 'o', 'student', [r['mIoU'] for r in seeds.values()]),
                (0.08, 'D', 'teacher', [r['teacher']['mIoU'] for r in
                                        seeds.values() if r['teacher']])):
            if values:
                dots.plot([at + shift] * len(values), values, marker, ms=6,
                          color=color, alpha=0.75, mew=1.2,
                          mfc=color if label == 'student' else 'none')
                dots.plot([at + shift - 0.06, at + shift + 0.06],
                          [np.mean(values)] * 2, color='black', lw=1.2)
        width = 0.8 / len(methods)
        means = [np.mean(list(class_scores(seeds, n).values()) or [np.nan])
                 for n in names]
        offset = (at - (len(methods) - 1) / 2) * width
        bars.bar(np.arange(len(names)) + offset, means, width, label=method,
                 color=color)
    dots.set_xticks(range(len(methods)), list(methods), rotation=30,
                    ha='right')
    dots.set_xlim(-0.5, len(methods) - 0.5)
    dots.set_ylabel('target mIoU')
    dots.set_title(f'{pair}: one mark per seed, filled: student, '
                   'hollow: teacher, line: mean', fontsize=10)
    dots.grid(axis='y', alpha=0.3)
    bars.set_xticks(range(len(names)), names, rotation=30, ha='right')
    bars.set_ylabel('IoU, mean over seeds')
    bars.grid(axis='y', alpha=0.3)
    bars.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1),
                ncols=1 if len(bars.containers) < 17 else 2)
    figure.tight_layout()
    # no metadata: the same results give the same bytes everywhere
    figure.savefig(path, metadata={'Software': None})


def short_table(results: Results) -> list[str]:
    """One line per pair and method, for a README."""
    rows = []
    for pair, methods in results.items():
        for method, seeds in methods.items():
            teacher = [r['teacher']['mIoU'] for r in seeds.values()
                       if r['teacher']]
            rows.append([
                pair, method, str(len(seeds)),
                spread(list(student_scores(seeds).values())),
                spread(teacher), difference_text(methods, method)])
    return table(['Pair', 'Method', 'Seeds', 'Student mIoU', 'Teacher mIoU',
                  f'Difference to {BASELINE}'], rows)


def update_readme(readme: Path, results: Results) -> None:
    """Replace what stands between the README's two result marks.

    Args:
        readme (Path): Left alone if it is missing or has no marks.
        results (dict): ``results[pair][method][seed]``.
    """
    if not readme.is_file():
        return
    head, begin, rest = readme.read_text().partition(README_MARKS[0])
    _, end, tail = rest.partition(README_MARKS[1])
    if end:
        lines = '\n'.join(short_table(results))
        readme.write_text(f'{head}{begin}\n{lines}\n{end}{tail}')


def write_report(results_dir: Path) -> Path:
    """Write report and plots from ``<results_dir>/results``."""
    from mmseg_contrast.engine.curves import draw_curves
    results = load_results(results_dir / 'results')
    results_dir.mkdir(parents=True, exist_ok=True)
    plots: dict[str, list[str]] = {}
    for pair, methods in results.items():
        pictures = [results_dir / f'{pair}.png']
        plot_pair(methods, pair, pictures[0])
        curves = {
            method: [([p[0] for p in r['curve']], [p[1] for p in r['curve']])
                     for r in seeds.values()]
            for method, seeds in methods.items()
        }
        # a curve needs more than the final point
        if any(len(steps) > 1 for runs in curves.values()
               for steps, _ in runs):
            pictures.append(results_dir / f'{pair}_curves.png')
            draw_curves(curves, pictures[1], title=f'{pair}, student')
        plots[pair] = [f'{results_dir.name}/{p.name}' for p in pictures]
    path = results_dir.with_name(results_dir.name + '.md')
    path.write_text(report(results, plots))
    update_readme(results_dir.parent.parent / 'README.md', results)
    return path


# ---------------------------------------------------------------------- main


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Run benchmark configs over seeds and report them.')
    parser.add_argument('--pairs', nargs='+', help='default: all')
    parser.add_argument('--methods', nargs='+', help='default: all')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=2,
                        help='processes at a time')
    parser.add_argument('--out', type=Path, default=Path(
        'work_dirs/benchmarks'), help='work dirs, logs and finished JSONs')
    parser.add_argument('--results', type=Path, default=Path(
        'docs/benchmarks'), help='copies of the JSONs, report and plots')
    parser.add_argument('--configs', type=Path, default=ROOT / 'configs' /
                        'benchmarks', help='folder of <pair>/<method>.py')
    parser.add_argument('--trainer', default=shlex.join(
        [sys.executable, str(ROOT / 'tools' / 'train.py')]),
        help='command that takes CONFIG --work-dir ... --cfg-options ...')
    parser.add_argument('--force', action='store_true',
                        help='repeat finished runs')
    parser.add_argument('--report-only', action='store_true')
    parser.add_argument('--cfg-options', nargs='+', default=[],
                        help='key=value pairs for every run')
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error('--jobs must be at least 1')
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the report.

    Returns:
        int: Exit code; 1 if a run failed.
    """
    args = parse_args(arguments)
    results_dir = args.results.resolve()
    failures: list[tuple[Run, str]] = []
    if not args.report_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        runs = find_runs(args.configs.resolve(), args.out.resolve(),
                         args.pairs, args.methods, args.seeds,
                         args.cfg_options)
        if not runs:
            raise ValueError(f'--configs {args.configs}: no '
                             '<pair>/<method>.py in there.')
        runner = Runner(shlex.split(args.trainer), args.jobs, args.force)
        try:
            failures = runner.run_all(runs)
        except KeyboardInterrupt:
            print_log('stopped; the same command goes on from here')
            return 130
        for run in runs:
            if run.result.is_file():
                copy = results_dir / 'results' / run.relative
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run.result, copy)
    print_log(f'report: {write_report(results_dir)}')
    for run, reason in failures:
        print_log(f'failed: {run.name}: {reason}')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
