"""Test a checkpoint: the same flags as MMSegmentation's tools/test.py."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone tests its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
from mmengine.config import Config, ConfigDict, DictAction  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmseg.registry import METRICS, RUNNERS  # noqa: E402

from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Test a segmentor.')
    parser.add_argument('config', help='train config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir', help='folder for the metrics, written as JSON')
    parser.add_argument(
        '--out', help='folder for the predictions, for offline evaluation')
    parser.add_argument(
        '--show', action='store_true', help='show the predictions')
    parser.add_argument(
        '--show-dir',
        help='folder for painted images; of how many, says '
        'default_hooks.visualization.interval')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds between shows')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, as key=value; lists are '
        'written key="[a,b]" or key=a,b, nested ones key="[(a,b),(c,d)]", '
        'with quotation marks and without white space')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher')
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def enable_visualization(cfg: Config, show: bool, show_dir: str | None,
                         wait_time: float) -> None:
    """Let the visualization hook draw every prediction.

    Args:
        cfg (Config): The config, changed in place.
        show (bool): Open a window.
        show_dir (str, optional): Save the pictures there.
        wait_time (float): Seconds between two windows.

    Raises:
        ValueError: If the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need a hook in the config: '
            "default_hooks.visualization=dict(type='SegVisualizationHook').")
    hook.draw = True
    if show:
        hook.show = True
        hook.wait_time = wait_time
    if show_dir:
        cfg.visualizer.save_dir = show_dir


def enable_tta(cfg: Config) -> None:
    """Wrap the model and exchange the pipeline for test-time augmentation.

    Args:
        cfg (Config): The config, changed in place.

    Raises:
        ValueError: If the config doesn't say how to augment.
    """
    for key in ('tta_pipeline', 'tta_model'):
        if key not in cfg:
            raise ValueError(
                f'--tta needs {key} in the config; '
                'configs/_base_/default_runtime.py has one.')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # wrappers such as RepeatDataset
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def save_predictions(evaluator: ConfigDict | list[ConfigDict],
                     folder: str) -> None:
    """Tell the metrics to write what the model predicts.

    Of several metrics, each but the first writes into a folder of its own,
    named after its prefix (``teacher``) or its place.

    Args:
        evaluator (ConfigDict | list): ``test_evaluator``, changed in place.
        folder (str): Where to write.

    Raises:
        ValueError: If no metric can write predictions.
    """
    metrics = evaluator if isinstance(evaluator, list) else [evaluator]
    written = 0
    for place, metric in enumerate(metrics):
        kind = metric.type
        metric_class = METRICS.get(kind) if isinstance(kind, str) else kind
        accepted = inspect.signature(metric_class).parameters
        if 'output_dir' not in accepted:
            continue
        own = metric.get('prefix') or f'metric_{place}'
        metric.output_dir = os.path.join(folder, own) if written else folder
        if 'keep_results' in accepted:
            metric.keep_results = True
        written += 1
    if not written:
        raise ValueError(
            '--out needs a metric with the argument output_dir in '
            "test_evaluator, such as dict(type='IoUMetric').")


def main() -> None:
    """Build the runner that the config describes, and test."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)

    # The command line has the last word, then the config.
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    cfg.load_from = args.checkpoint

    if args.show or args.show_dir:
        enable_visualization(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        enable_tta(cfg)
    if args.out is not None:
        save_predictions(cfg.test_evaluator, args.out)

    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(
        cfg)
    runner.test()


if __name__ == '__main__':
    with one_sentence():
        main()
