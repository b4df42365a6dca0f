"""Check ACDC, and make the train ids that are missing.

    rgb_anon/fog/train/GOPR0475/*_rgb_anon.png
    gt/fog/train/GOPR0475/*_gt_labelTrainIds.png   shipped
    gt/fog/train/GOPR0475/*_gt_labelIds.png        used where those are missing

the same for val and for night, rain and snow. The split test has no labels.
The reference images are not looked at.
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
    Part(f'rgb_anon/{condition}/{split}',
         None if split == 'test' else f'gt/{condition}/{split}',
         '_rgb_anon.png')
    for condition in ('fog', 'night', 'rain', 'snow')
    for split in ('train', 'val', 'test')
]
LABELS = LabelFormat('_gt_labelIds.png', '_gt_labelTrainIds.png',
                     CITYSCAPES_TRAIN_IDS, known_ids=CITYSCAPES_IDS,
                     shipped=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit status."""
    args = argument_parser(__doc__, 'data/acdc').parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
