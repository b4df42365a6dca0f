"""The command backbone: mmseg's MiT, and the one with fused attention."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn

from .arguments import add_common, add_sizes, read_sizes
from .draws import generator
from .memory import peak_above, peak_in_new_process
from .report import circumstances, in_words, mebibytes, table, write_json
from .timing import Spread, Timer, forbid_waiting, ratios

STOCK = 'MixVisionTransformer'
KINDS = (STOCK, 'SDPAMixVisionTransformer')
#: Channels of a head and blocks of each stage, by the names of SegFormer.
NETS = dict(
    b0=(32, (2, 2, 2, 2)), b1=(64, (2, 2, 2, 2)), b2=(64, (3, 4, 6, 3)),
    b3=(64, (3, 4, 18, 3)), b4=(64, (3, 8, 27, 3)), b5=(64, (3, 6, 40, 3)))
PRECISIONS = ('float32', 'bfloat16', 'float16')


@dataclass(frozen=True)
class ImageSizes:
    """Sizes of what goes through a backbone.

    Args:
        samples (int): Images of a pass.
        height (int): In pixels.
        width (int): In pixels.
    """

    samples: int = 2
    height: int = 512
    width: int = 512


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        kind (str): A registered backbone.
        net (str): 'b0' to 'b5'.
        sizes (ImageSizes): Of the images.
        device (str): 'cpu' or 'cuda'.
        amp (str): Of autocast; 'float32' is none.
    """

    kind: str
    net: str
    sizes: ImageSizes
    device: str
    amp: str

    def build(self) -> nn.Module:
        """The backbone, in training mode, without stochastic depth."""
        init_default_scope('mmseg')
        width, layers = NETS[self.net]
        torch.manual_seed(0)
        model = MODELS.build(dict(
            type=self.kind, embed_dims=width, num_layers=layers,
            num_heads=(1, 2, 5, 8)))
        return model.to(self.device).train()

    def images(self) -> Tensor:
        """Normalised images."""
        return torch.randn(
            self.sizes.samples, 3, self.sizes.height, self.sizes.width,
            generator=generator()).to(self.device)


def forward(model: nn.Module, images: Tensor, amp: str) -> Tensor:
    """The mean of squares of all outputs."""
    cast = nullcontext() if amp == 'float32' else torch.autocast(
        images.device.type, getattr(torch, amp))
    with cast:
        outputs = model(images)
    return sum(one.float().square().mean() for one in outputs)


def train(model: nn.Module, images: Tensor, amp: str) -> None:
    """Forward and backward."""
    model.zero_grad()
    forward(model, images, amp).backward()


def predict(model: nn.Module, images: Tensor, amp: str) -> None:
    """Forward alone, as of a teacher."""
    with torch.no_grad():
        forward(model, images, amp)


def kept_bytes(model: nn.Module, images: Tensor, amp: str) -> int:
    """Bytes that a forward keeps for its backward, besides the weights."""
    storages: dict[int, int] = {}
    # What is kept stays alive meanwhile: no address is used twice.
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        result = forward(model, images, amp)
    del result
    return sum(storages.values())


def peak_of(case: dict[str, Any]) -> int:
    """Peak bytes of forward and backward, above weights and gradients.

    Args:
        case (dict): The fields of :class:`Case` and ``part``.
    """
    one = Case(case['kind'], case['net'], ImageSizes(**case['sizes']),
               case['device'], case['amp'])
    model, images = one.build(), one.images()
    # Code, threads and gradients are there before memory is counted.
    train(model, images[:1, :, :64, :64], one.amp)
    return peak_above(partial(train, model, images, one.amp), one.device)


def difference(models: dict[str, nn.Module], images: Tensor, amp: str
               ) -> tuple[float, float]:
    """Largest ones of outputs and gradients, of the largest entry of each."""
    found = []
    for model in models.values():
        train(model, images, amp)
        with torch.no_grad():
            outputs = [one.float() for one in model(images)]
        found.append((outputs, [one.grad for one in model.parameters()]))
    return tuple(
        max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
            for a, b in zip(mine, theirs, strict=True))
        if i == 0 else
        max(float((a - b).abs().max()) for a, b in zip(
            mine, theirs, strict=True)) / max(
                float(one.abs().max()) for one in theirs)
        for i, (theirs, mine) in enumerate(zip(*found, strict=True)))


def measure(net: str, sizes: ImageSizes, amp: str, timer: Timer,
            memory: bool, sync_check: bool) -> dict[str, Any]:
    """Both backbones, in turns.

    Args:
        net (str): 'b0' to 'b5'.
        sizes (ImageSizes): Of the images.
        amp (str): Of autocast.
        timer (Timer): How it is measured.
        memory (bool): Whether peaks are, too.
        sync_check (bool): Whether waiting for a GPU is an error first.
    """
    cases = {kind: Case(kind, net, sizes, timer.device, amp)
             for kind in KINDS}
    models = {kind: one.build() for kind, one in cases.items()}
    images = cases[STOCK].images()
    works = {f'{work.__name__} {kind}': partial(work, model, images, amp)
             for work in (train, predict) for kind, model in models.items()}
    if sync_check:
        forbid_waiting(works.values())
    seconds = timer.in_turns(works)
    rows = []
    for kind, model in models.items():
        row: dict[str, Any] = dict(
            kind=kind, kept=kept_bytes(model, images, amp),
            peak=peak_in_new_process(dict(
                asdict(cases[kind]), part='backbone')) if memory else None)
        for work in ('train', 'predict'):
            mine = seconds[f'{work} {kind}']
            row[work] = asdict(Spread.of(mine))
            row[f'{work}_ratio'] = asdict(
                ratios(mine, seconds[f'{work} {STOCK}']))
        rows.append(row)
    outputs, gradients = difference(models, images, amp)
    return dict(net=net, amp=amp, rows=rows, outputs=outputs,
                gradients=gradients)


def as_table(result: dict[str, Any]) -> str:
    """Of :func:`measure`."""
    rows = []
    for row in result['rows']:
        times = [Spread(**row[key]).text(1e3 if 'ratio' not in key else 1, 2)
                 for work in ('train', 'predict')
                 for key in (work, f'{work}_ratio')]
        rows.append((row['kind'], *times, mebibytes(row['kept']),
                     mebibytes(row['peak'])))
    return table(
        ('MiT', 'forward and backward, ms', 'of mmseg', 'forward, ms',
         'of mmseg', 'kept for the backward, MiB', 'peak MiB'), rows)


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'backbone', help="mmseg's MiT, and the one with fused attention")
    parser.set_defaults(run=run_backbone)
    parser.add_argument(
        '--nets', nargs='+', default=['b5'], choices=NETS, metavar='NET',
        help='out of ' + ' '.join(NETS))
    parser.add_argument(
        '--amp', default='float32', choices=PRECISIONS,
        help='of autocast; float32 is none')
    parser.add_argument(
        '--no-memory', action='store_true', help='do not measure peaks')
    add_sizes(parser, ImageSizes)
    add_common(parser)


def run_backbone(args: argparse.Namespace) -> None:
    """A table for each net."""
    sizes = read_sizes(args.sizes, ImageSizes)
    timer = Timer(args.device, args.repeats, args.clock)
    result: dict[str, Any] = dict(circumstances(timer, 'mmsegmentation',
                                                'onedl-mmsegmentation'),
                                  sizes=asdict(sizes), nets=[])
    for net in args.nets:
        found = measure(net, sizes, args.amp, timer, not args.no_memory,
                        args.sync_check)
        result['nets'].append(found)
        print(f'\nMiT-{net.upper()}, {sizes.samples} images of '
              f'{sizes.height} x {sizes.width}, {args.amp}; '
              f'{in_words(result)}\n\n{as_table(found)}\n\n'
              f'Largest difference of outputs {found["outputs"]:.0e}, of '
              f'gradients {found["gradients"]:.0e}, relative to the largest '
              'entry.', flush=True)
    write_json(args.json, result)
