"""Turn SegFormer's ImageNet weights of a MiT into mmseg's backbone's.

    python tools/model_converters/mit2mmseg.py mit_b5.pth mit_b5_mmseg.pth

The result is what ``init_cfg=dict(type='Pretrained', checkpoint=...)`` of the
backbone loads. See docs/legacy_checkpoints.md.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402
from mmseg_contrast.models import (  # noqa: E402
    ReferenceMixVisionTransformer)
from mmseg_contrast.models.legacy import (  # noqa: E402
    check_target, convert_backbone, fit, mit_shape, read_weights, table,
    write_weights)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Convert SegFormer's ImageNet weights of a MiT.")
    parser.add_argument('source', help='the published file, as mit_b5.pth')
    parser.add_argument('target', help='the file to write')
    parser.add_argument(
        '--force', action='store_true', help='replace an existing target')
    return parser.parse_args()


def convert(source: Path, target: Path, force: bool) -> None:
    """Convert a backbone and say what it is.

    Args:
        source (Path): The published file.
        target (Path): The file to write.
        force (bool): Replace an existing target.

    Raises:
        ValueError: If it is no whole Mix Transformer; nothing is written.
    """
    check_target(target, source, force)
    weights, _ = read_weights(source)
    try:
        shape = mit_shape(weights)
        converted = convert_backbone(weights)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    config = shape.config()
    model = ReferenceMixVisionTransformer(**config).state_dict()
    result = fit(converted, model)

    name = shape.variant or 'no published variant'
    print(f'{source} is {name}: channels {shape.channels}, blocks '
          f'{shape.depths}')
    print(table(weights, '', result.unplaced))
    result.check(str(source), f'the backbone that its stages say ({name})')
    if shape.variant is None:
        print(f'warning: the number of heads is in no file; '
              f'{config["num_heads"]} are assumed.', file=sys.stderr)

    write_weights(target, result.placed,
                  dict(legacy=dict(file=source.name, variant=name)))
    known = inspect.signature(ReferenceMixVisionTransformer).parameters
    settings = {
        key: value for key, value in config.items()
        if key in ('embed_dims', 'num_layers', 'num_heads')
        or value != known[key].default}
    print(f'Wrote {target}, for\n  backbone=dict('
          "type='ReferenceMixVisionTransformer', "
          f'{", ".join(f"{key}={value}" for key, value in settings.items())},'
          f"\n      init_cfg=dict(type='Pretrained', checkpoint="
          f'{str(target)!r}))')


def main() -> None:
    """Convert what the command line asks for."""
    args = parse_args()
    with one_sentence():
        convert(Path(args.source), Path(args.target), args.force)


if __name__ == '__main__':
    main()
