"""Check Nighttime Driving (its test set), and make missing train ids.

    leftImg8bit/test/night/*_leftImg8bit.png
    gtCoarse_daytime_trainvaltest/test/night/*_gtCoarse_labelTrainIds.png
    gtCoarse_daytime_trainvaltest/test/night/*_gtCoarse_labelIds.png

The labelTrainIds are shipped, the labelIds are used where those are missing.
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

PARTS = [Part('leftImg8bit/test/night',
              'gtCoarse_daytime_trainvaltest/test/night',
              '_leftImg8bit.png')]
LABELS = LabelFormat('_gtCoarse_labelIds.png', '_gtCoarse_labelTrainIds.png',
                     CITYSCAPES_TRAIN_IDS, known_ids=CITYSCAPES_IDS,
                     shipped=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit status."""
    parser = argument_parser(__doc__, 'data/NighttimeDrivingTest')
    args = parser.parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
