"""Convert the labels of Cityscapes to train ids.

    leftImg8bit/train/aachen/*_leftImg8bit.png
    gtFine/train/aachen/*_gtFine_labelIds.png   ids 0 to 33

gives gtFine/train/aachen/*_gtFine_labelTrainIds.png, the same for val. Those
that are there already are compared with their labelIds. The labels of the
test split are dummies and not touched.
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
    *(Part(f'leftImg8bit/{split}', f'gtFine/{split}', '_leftImg8bit.png')
      for split in ('train', 'val')),
    Part('leftImg8bit/test', None, '_leftImg8bit.png',
         'leftImg8bit/test: its labels are dummies, only the images are '
         'checked'),
]
LABELS = LabelFormat('_gtFine_labelIds.png', '_gtFine_labelTrainIds.png',
                     CITYSCAPES_TRAIN_IDS, known_ids=CITYSCAPES_IDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = argument_parser(__doc__, 'data/cityscapes').parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
