"""Convert the labels of GTA5 (Playing for Data) to train ids.

    images/00001.png   1914 x 1052
    labels/00001.png   palette PNG; the indices are Cityscapes' ids 0 to 34

gives labels/00001_labelTrainIds.png and pairs.txt, the list of pairs whose
label has the size of its image. In the release some have not; they are named
and left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone runs its own code
    sys.path.insert(0, str(ROOT))

from mmseg_contrast.datasets.conversion import (  # noqa: E402
    CITYSCAPES_TRAIN_IDS,
    LabelFormat,
    Part,
    argument_parser,
    convert,
)
from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402

PARTS = [Part('images', 'labels')]
# 34 is the license plate
LABELS = LabelFormat('.png', '_labelTrainIds.png', CITYSCAPES_TRAIN_IDS,
                     known_ids=range(35))


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = argument_parser(__doc__, 'data/gta').parse_args(argv)
    return convert(args.root, PARTS, LABELS, out_dir=args.out_dir,
                   nproc=args.nproc, dry_run=args.dry_run, list_good=True)


if __name__ == '__main__':
    with one_sentence():
        sys.exit(main())
