"""Check Dark Zurich, and make the train ids that are missing.

    rgb_anon/{train,val,test}/night/GOPR0356/*_rgb_anon.png
    gt/val/night/GOPR0356/*_gt_labelTrainIds.png   shipped
    gt/val/night/GOPR0356/*_gt_labelIds.png        used where those are missing

Only val has labels. The images of train (day, twilight, night) and test are
checked too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone runs its own code
    sys.path.insert(0, str(ROOT))

from mmseg_contrast.datasets.conversion import (  # noqa: E402
    CITYSCAPES_IDS,
    CITYSCAPES_TRAIN_IDS,
    LabelFormat,
    Part,
    argument_parser,
    convert,
)
from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402

PARTS = [
    Part('rgb_anon/val/night', 'gt/val/night', '_rgb_anon.png'),
    *(Part(f'rgb_anon/{folder}', None, '_rgb_anon.png')
      for folder in ('train/night', 'train/twilight', 'train/day',
                     'test/night')),
]
LABELS = LabelFormat('_gt_labelIds.png', '_gt_labelTrainIds.png',
                     CITYSCAPES_TRAIN_IDS, known_ids=CITYSCAPES_IDS,
                     shipped=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit status."""
    args = argument_parser(__doc__, 'data/dark_zurich').parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
