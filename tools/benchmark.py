"""Measure what contrast and adaptation cost, and what they are made of.

    python tools/benchmark.py contrast
    python tools/benchmark.py contrast --device cuda --json contrast.json
    python tools/benchmark.py contrast --sizes anchors=256 length=500
    python tools/benchmark.py contrast-step --methods sepico-dist spcl
    python tools/benchmark.py step --config configs/daformer/... --turns 5
    python tools/benchmark.py update --config configs/daformer/...
    python tools/benchmark.py backbone --nets b5 --threads 1
    python tools/benchmark.py loader --config configs/daformer/...

What is compared runs in turns in the same process (A B C A B C ...), and a
ratio is the median of the ratios of the turns: other work on the machine
slows down all of a turn. In brackets are the quartiles. On a busy machine
``--threads 1 --clock process`` counts the seconds of the processor that were
spent here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))
if (TOOLS.parent / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(TOOLS.parent))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import torch  # noqa: E402
from benchmarks import (  # noqa: E402
    backbone,
    contrast,
    contrast_step,
    loader,
    step,
    update,
)
from benchmarks.arguments import check_common  # noqa: E402

from mmseg_contrast.engine.mistakes import one_sentence  # noqa: E402


def run_peak(args: argparse.Namespace) -> None:
    """Peak memory of one case, in bytes, on the last line."""
    case = json.loads(args.case)
    torch.set_num_threads(case['threads'])
    parts = dict(step=step, backbone=backbone)
    print(parts.get(case['part'], contrast).peak_of(case))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for module in (contrast, contrast_step, step, update, backbone, loader):
        module.add_command(commands)
    peak = commands.add_parser('peak', help='used by the others')
    peak.set_defaults(run=run_peak)
    peak.add_argument('case')
    args = parser.parse_args()
    check_common(parser, args)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    if getattr(args, 'threads', None):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == '__main__':
    with one_sentence():
        main()
