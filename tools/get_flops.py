"""Count FLOPs and parameters of a config's student.

For example ``python tools/get_flops.py CONFIG --shape 512 1024``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import torch  # noqa: E402
from mmengine.analysis import get_model_complexity_info  # noqa: E402
from mmengine.config import Config, ConfigDict, DictAction  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Count FLOPs and parameters of the student.')
    parser.add_argument('config', help='train config file')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        default=[1024, 2048],
        help='height and width of the image, or one number for both')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config, as key=value')
    args = parser.parse_args()
    if len(args.shape) > 2:
        parser.error('--shape takes one or two numbers.')
    return args


def student_config(model: ConfigDict) -> ConfigDict:
    """The plain model of a config, adapted or not."""
    return model.segmentor if 'segmentor' in model else model


def count(model: ConfigDict, height: int, width: int) -> dict[str, float]:
    """Count what one forward pass of one image costs.

    Auxiliary heads are left out, as they don't run at test time.

    Args:
        model (ConfigDict): ``model`` of a config.
        height (int): Height of the image.
        width (int): Width of the image.

    Returns:
        dict: ``flops`` (multiply-adds) and ``params``.
    """
    student = student_config(model).copy()
    student.pop('auxiliary_head', None)
    backbone = student.get('backbone', {})
    channels = backbone.get('in_channels', 3)
    segmentor = revert_sync_batchnorm(MODELS.build(student)).eval()
    image = torch.rand(1, channels, height, width)
    if torch.cuda.is_available():
        segmentor, image = segmentor.cuda(), image.cuda()
    result = get_model_complexity_info(
        segmentor,
        input_shape=None,
        inputs=(image, ),
        show_table=False,
        show_arch=False)
    return dict(
        flops=float(result['flops']),
        params=float(sum(p.numel() for p in segmentor.parameters())))


def main() -> None:
    """Print the counts of the config on the command line."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    height, width = (args.shape * 2)[:2]
    result = count(cfg.model, height, width)
    sys.stdout.write(f'Input: {height} x {width}\n'
                     f'FLOPs: {result["flops"] / 1e9:.3f} G (multiply-adds)\n'
                     f'Parameters: {result["params"] / 1e6:.3f} M\n')


if __name__ == '__main__':
    main()
