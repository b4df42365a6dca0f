"""Turn a published DAFormer, HRDA, MIC or SePiCo checkpoint into one of ours.

    python tools/model_converters/daformer2mmseg.py \
        iter_40000.pth daformer.pth --config CONFIG
    python tools/model_converters/daformer2mmseg.py \
        iter_40000.pth teacher.pth --config CONFIG --part teacher

The result loads strictly into the student of the config, which may be a
plain segmentor or a UDASegmentor. See docs/legacy_checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import numpy as np  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.models.backbones import MixVisionTransformer  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.utils import cityscapes_classes, cityscapes_palette  # noqa: E402
from torch import nn  # noqa: E402

from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402
from mmseg_contrast.models import (  # noqa: E402
    ReferenceMixVisionTransformer)
from mmseg_contrast.models.legacy import (  # noqa: E402
    PARTS, check_target, convert_backbone, convert_student, fit,
    read_weights, table, take_part, write_weights)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Convert a published DAFormer, HRDA, MIC or SePiCo '
        'checkpoint.')
    parser.add_argument('source', help='the published .pth file')
    parser.add_argument('target', help='the file to write')
    parser.add_argument(
        '--config', required=True,
        help='config with the same network: a plain segmentor or a '
        'UDASegmentor')
    parser.add_argument(
        '--part', choices=sorted(PARTS), default='student',
        help='which model of the file; imnet is the frozen ImageNet backbone '
        'alone, under the names that init_cfg loads (default: student)')
    parser.add_argument(
        '--force', action='store_true', help='replace an existing target')
    return parser.parse_args()


def build_student(config: str) -> tuple[nn.Module, str]:
    """The segmentor of a config, with weights that mean nothing.

    Args:
        config (str): Path of the config.

    Returns:
        tuple[nn.Module, str]: The student, and its key in the config.

    Raises:
        ValueError: If the config has no segmentor.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model, where = cfg.get('model'), 'model'
    if isinstance(model, ConfigDict) and 'segmentor' in model:
        model, where = model.segmentor, 'model.segmentor'
    if not isinstance(model, ConfigDict) or 'backbone' not in model:
        raise ValueError(f'{config} has no {where}.backbone, so it is no '
                         'config of a segmentor.')
    _forget_pretrained(model)
    with warnings.catch_warnings():
        # How mmseg averages a loss is no news here.
        warnings.filterwarnings('ignore', message='Default ``avg_non_ignore')
        return MODELS.build(model), where


def dataset_meta(meta: dict[str, Any], classes: int) -> dict[str, Any]:
    """Names and colours of the classes.

    Args:
        meta (dict): Of the published file.
        classes (int): How many the student has.

    Returns:
        dict: ``classes`` and ``palette``: the file's if it has that many,
        else those of Cityscapes if there are 19, else nothing.
    """
    names, colours = meta.get('CLASSES'), meta.get('PALETTE')
    if isinstance(colours, np.ndarray):
        colours = colours.tolist()
    if _is_list_of(names, classes) and _is_list_of(colours, classes):
        return dict(classes=[str(name) for name in names],
                    palette=[[int(one) for one in rgb] for rgb in colours])
    if classes == 19:
        return dict(classes=cityscapes_classes(),
                    palette=cityscapes_palette())
    return {}


def convert(source: Path, target: Path, config: str, part: str,
            force: bool) -> None:
    """Convert one model of a file and say what became of each key.

    Args:
        source (Path): The published file.
        target (Path): The file to write.
        config (str): Path of the config with the same network.
        part (str): A key of ``PARTS``.
        force (bool): Replace an existing target.

    Raises:
        ValueError: If anything is missing or doesn't fit; nothing is written.
    """
    check_target(target, source, force)
    weights, meta = read_weights(source)
    student, where = build_student(config)
    try:
        taken, prefix = take_part(weights, part)
        if part == 'imnet':
            # Its head was never trained.
            prefix += 'backbone.'
            taken = {key.removeprefix('backbone.'): value
                     for key, value in taken.items()
                     if key.startswith('backbone.')}
            converted = convert_backbone(taken)
        else:
            converted = convert_student(taken)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    if part == 'imnet':
        model, name = student.backbone.state_dict(), f'{where}.backbone'
    else:
        model, name = student.state_dict(), where
    result = fit(converted, model)

    print(f'{part}: {len(taken)} of {len(weights)} keys of {source}'
          f'{f" ({prefix}*)" if prefix else ""} become '
          f'{len(result.placed)} of {len(model)} keys of {name} in {config}')
    print(table(weights, prefix, result.unplaced))
    result.check(str(source), f'{name} in {config}')

    stock = (isinstance(student.backbone, MixVisionTransformer)
             and not isinstance(student.backbone,
                                ReferenceMixVisionTransformer))
    if converted.published_mit and stock:
        print(f"warning: set {where}.backbone.type = "
              f"'ReferenceMixVisionTransformer' in {config}: some norms of "
              f'{type(student.backbone).__name__} have another eps than the '
              'published ones, which moves the features by about 1e-4.',
              file=sys.stderr)
    written: dict[str, Any] = dict(
        legacy=dict(file=source.name, part=part, prefix=prefix))
    if isinstance(meta.get('iter'), int):
        written['legacy']['iter'] = meta['iter']
    if part != 'imnet':
        head = student.decode_head
        if isinstance(head, nn.ModuleList):  # a cascade decides at its end
            head = head[-1]
        written['dataset_meta'] = dataset_meta(meta, head.num_classes)
    write_weights(target, result.placed, written)
    print(f'Wrote {target}')


def _forget_pretrained(config: Any) -> None:
    """Take out what would be downloaded, in place."""
    if isinstance(config, dict):
        for key in ('init_cfg', 'pretrained'):
            if key in config:
                config[key] = None
        for value in config.values():
            _forget_pretrained(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _forget_pretrained(value)


def _is_list_of(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def main() -> None:
    """Convert what the command line asks for."""
    args = parse_args()
    with one_sentence():
        convert(Path(args.source), Path(args.target), args.config, args.part,
                args.force)


if __name__ == '__main__':
    main()
