"""Convert the labels of SYNTHIA-RAND-CITYSCAPES to train ids.

    RGB/0000000.png         1280 x 760
    GT/LABELS/0000000.png   3 channels of 16 bits; red is the class 0 to 22,
                            the others number instances

gives GT/LABELS/0000000_labelTrainIds.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone runs its own code
    sys.path.insert(0, str(ROOT))

from mmseg_contrast.datasets.conversion import (  # noqa: E402
    LabelFormat,
    Part,
    argument_parser,
    convert,
    read_first_channel,
)
from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402

PARTS = [Part('RGB', 'GT/LABELS')]
# The published mapping. Terrain (16), truck (18) and train (20) have ids but
# no pixel. Void, parking slot, road work and lane marking are ignored.
TRAIN_IDS = {
    1: 10, 2: 2, 3: 0, 4: 1, 5: 4, 6: 8, 7: 5, 8: 13, 9: 7, 10: 11, 11: 18,
    12: 17, 15: 6, 16: 9, 17: 12, 18: 14, 19: 15, 20: 16, 21: 3,
}
LABELS = LabelFormat('.png', '_labelTrainIds.png', TRAIN_IDS,
                     known_ids=range(23), read=read_first_channel)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = argument_parser(__doc__, 'data/synthia').parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
