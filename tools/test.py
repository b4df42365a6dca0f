"""Test a checkpoint: the same flags as MMSegmentation's tools/test.py."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone tests its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
from mmcv.transforms import LoadAnnotations  # noqa: E402
from mmengine.config import Config, ConfigDict, DictAction  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmseg.registry import METRICS, RUNNERS, TRANSFORMS  # noqa: E402

from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402
from mmseg_contrast.models import batched_slide  # noqa: E402


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
        '--server',
        action='store_true',
        help="predict the config's server_dataloader, a test split without "
        'labels, and write what its test server takes to the folder --out')
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
    hook.interval = 1  # of batches: stock mmseg draws each 50th otherwise
    if show:
        hook.show = True
        hook.wait_time = wait_time
    if show_dir:
        cfg.visualizer.save_dir = show_dir


def inner_datasets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Configs of the datasets inside wrappers.

    Args:
        dataset (ConfigDict): A dataset, or wrappers (``MappedDataset``,
            ``ConcatDataset``, ...) around some.

    Yields:
        ConfigDict: Every innermost dataset.
    """
    inner = dataset.get('datasets', [])
    if 'dataset' in dataset:
        inner = [*inner, dataset.dataset]
    for one in inner:
        yield from inner_datasets(one)
    if not inner:
        yield dataset


def without_labels(pipeline: list) -> list:
    """A pipeline that reads no label file.

    Args:
        pipeline (list): Configs of transforms, ``TestTimeAug`` among them.

    Returns:
        list: The same, less what loads annotations.
    """
    kept = []
    for step in pipeline:
        if isinstance(step, list):  # the choices of TestTimeAug
            step = without_labels(step)
            if step:  # of no choice at all it would make no copy
                kept.append(step)
            continue
        kind = step['type']
        kind = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, LoadAnnotations):
            continue
        if 'transforms' in step:
            step = dict(step, transforms=without_labels(step['transforms']))
        kept.append(step)
    return kept


def use_server_split(cfg: Config, folder: str | None) -> None:
    """Test on the split whose labels only a server has.

    Args:
        cfg (Config): The config, changed in place.
        folder (str, optional): Where the predictions go.

    Raises:
        ValueError: If there is no folder or the config has no such split.
    """
    if folder is None:
        raise ValueError(
            '--server needs --out, the folder for what will be uploaded.')
    for key in ('server_dataloader', 'server_evaluator'):
        if cfg.get(key) is None:
            raise ValueError(
                f'--server needs {key} in the config, the test split without '
                'labels and its metric; docs/evaluation.md shows both.')
    cfg.test_dataloader = cfg.server_dataloader
    cfg.test_evaluator = cfg.server_evaluator
    for dataset in inner_datasets(cfg.test_dataloader.dataset):
        if 'pipeline' in dataset:
            dataset.pipeline = without_labels(dataset.pipeline)
    if 'tta_pipeline' in cfg:
        cfg.tta_pipeline = without_labels(cfg.tta_pipeline)


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
    for dataset in inner_datasets(cfg.test_dataloader.dataset):
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

    if args.server:
        use_server_split(cfg, args.out)
    if args.show or args.show_dir:
        enable_visualization(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        enable_tta(cfg)
    if args.out is not None:
        save_predictions(cfg.test_evaluator, args.out)

    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(
        cfg)
    with batched_slide(runner.model):
        runner.test()


if __name__ == '__main__':
    with one_sentence():
        main()
