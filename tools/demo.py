"""Train source-only and UDA on the embedded streets and compare them.

usage: python tools/demo.py [--seed 0] [--work-dir work_dirs/demo]
       [--cfg-options KEY=VALUE ...]

Both runs go at once, each on its share of the cores. The last line reads
``demo: source-only X mIoU, uda Y mIoU``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = {'source-only': 'source_only', 'uda': 'uda'}
ITERATION = re.compile(r'Iter\(train\)\s+\[\s*(\d+)/\s*(\d+)\]')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Train source-only and UDA on the embedded streets')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--work-dir', type=Path,
                        default=Path('work_dirs/demo'))
    parser.add_argument('--cfg-options', nargs='+', default=[],
                        help='as in tools/train.py, for both runs')
    return parser.parse_args()


def start(name: str, args: argparse.Namespace,
          threads: int) -> subprocess.Popen:
    """Start one training run; its output goes to ``train.log``."""
    folder = args.work_dir / RUNS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable, str(ROOT / 'tools' / 'train.py'),
        str(ROOT / 'configs' / 'quickstart' / f'{RUNS[name]}.py'),
        '--work-dir', str(folder), '--cfg-options',
        f'randomness.seed={args.seed}', *args.cfg_options]
    path = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    env = dict(
        os.environ, OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        PYTHONPATH=os.pathsep.join(p for p in path if p))
    with (folder / 'train.log').open('w') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def progress(folder: Path) -> str:
    """How far a run is, from its log."""
    found = ITERATION.findall((folder / 'train.log').read_text())
    return '/'.join(found[-1]) if found else 'starting'


def final_metrics(folder: Path) -> dict[str, float]:
    """Metrics of the last validation.

    Args:
        folder (Path): Work dir of the run.
    """
    scalars = max(folder.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [line for line in lines if 'mIoU' in line][-1]


def wait(processes: dict[str, subprocess.Popen],
         args: argparse.Namespace) -> None:
    """Show progress until all runs are done.

    Raises:
        SystemExit: If a run fails; the end of its log is shown.
    """
    begun = last = time.time()
    try:
        while any(p.poll() is None for p in processes.values()):
            time.sleep(1)
            if time.time() - last >= 15:
                last = time.time()
                state = ', '.join(
                    f'{name} {progress(args.work_dir / RUNS[name])}'
                    for name in processes)
                print(f'  {last - begun:4.0f} s  {state}', flush=True)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
    for name, process in processes.items():
        if process.returncode:
            log = args.work_dir / RUNS[name] / 'train.log'
            print('\n'.join(log.read_text().splitlines()[-15:]))
            raise SystemExit(f'demo: {name} failed; see {log}')


def main() -> None:
    """Train both, compare, print."""
    args = parse_args()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    threads = max(1, min(4, cores // len(RUNS)))
    print('Training on the embedded streets: source-only, and with the '
          'unlabelled target (uda).')
    processes = {name: start(name, args, threads) for name in RUNS}
    wait(processes, args)

    results = {name: final_metrics(args.work_dir / RUNS[name])
               for name in RUNS}
    classes = [key[4:] for key in results['uda'] if key.startswith('IoU.')]
    print(f'\n{"target IoU":<16}' + ''.join(f'{n:>14}' for n in RUNS))
    for label in [*classes, 'mIoU']:
        key = label if label == 'mIoU' else f'IoU.{label}'
        print(f'{label:<16}' + ''.join(
            f'{results[name].get(key, float("nan")):>14.2f}'
            for name in RUNS))

    from mmseg_contrast.engine.curves import plot_curves
    curve = args.work_dir / 'curve.png'
    plot_curves(
        [max((args.work_dir / folder).glob('*/vis_data/scalars.json'))
         for folder in RUNS.values()], list(RUNS), curve)
    panels = sorted((args.work_dir / 'uda').glob('**/panels/*.png'))
    print(f'\npanel: {panels[-1]}\ncurve: {curve}')
    both = ', '.join(f'{name} {results[name]["mIoU"]:.2f} mIoU'
                     for name in RUNS)
    print(f'demo: {both}')


if __name__ == '__main__':
    main()
