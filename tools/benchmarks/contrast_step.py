"""The command contrast-step: what contrast adds to a step of DACS."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .arguments import add_common, add_sizes, read_sizes
from .cut import cut
from .draws import blocks, generator
from .kernel import LIBRARY
from .report import (
    circumstances,
    in_words,
    judge,
    table,
    table_of_targets,
    write_json,
)
from .timing import Spread, Timer, forbid_waiting, ratios

ROOT = Path(__file__).resolve().parents[2]
#: Largest share of a DACS step for labels, sampler, bank and kernel.
TARGET = 0.1
METHODS = ('spcl', 'sdca', 'sepico-proto', 'sepico-dist', 'sepico-dist@128',
           'sepico-bank', 'contrastive-seg', 'contrastive-seg-memory')
#: Widths of SegFormer-B0's four outputs.
WIDTHS = (32, 64, 160, 256)


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'contrast-step', help='what contrast adds to a step of DACS')
    parser.set_defaults(run=run_contrast_step)
    parser.add_argument(
        '--methods', nargs='+', default=list(METHODS), metavar='NAME',
        help='files of configs/_base_/contrast; NAME@D for a projection to D '
        'channels; ' + ' '.join(METHODS))
    add_sizes(parser, StepSizes)
    add_common(parser)


@dataclass(frozen=True)
class StepSizes:
    """What a step is measured with.

    Args:
        side (int): Height and width of the images.
        samples (int): Images of the source, and of the target.
        classes (int): C.
    """

    side: int = 512
    samples: int = 2
    classes: int = 19


def segformer_b0(sizes: StepSizes, heads: list[dict[str, Any]]
                 ) -> dict[str, Any]:
    """SegFormer-B0 (Xie et al., 2021) with random weights."""
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
            size=(sizes.side, sizes.side), seg_pad_val=255),
        backbone=dict(
            type='MixVisionTransformer', embed_dims=32,
            num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8], mlp_ratio=4,
            qkv_bias=True, drop_path_rate=0.1),
        decode_head=dict(
            type='SegformerHead', in_channels=list(WIDTHS),
            in_index=[0, 1, 2, 3], channels=256, dropout_ratio=0.1,
            num_classes=sizes.classes, norm_cfg=dict(type='BN'),
            align_corners=False, loss_decode=dict(type='CrossEntropyLoss')),
        train_cfg=dict(), test_cfg=dict(mode='whole'))
    return dict(model, auxiliary_head=heads) if heads else model


def contrast_parts(method: str, sizes: StepSizes
                   ) -> tuple[list[dict[str, Any]], dict[str, dict]]:
    """Heads and objectives of a method, active from the first step on.

    What is projected are all outputs of the backbone at the size of the
    first; without a projection it is the last one as it is.

    Args:
        method (str): A file of ``configs/_base_/contrast``, and ``@D`` for
            another width of the projection than the published one.
        sizes (StepSizes): Of the step.

    Raises:
        SystemExit: If there is no such file.
    """
    name, _, width = method.partition('@')
    path = ROOT / 'configs' / '_base_' / 'contrast' / f'{name}.py'
    if not path.is_file():
        known = sorted(one.stem for one in path.parent.glob('*.py'))
        raise SystemExit(f'--methods {method}: there is no {path}; known are '
                         f'{", ".join(known)}.')
    config = Config.fromfile(path).contrast
    heads, objectives = [], {}
    for key in ('head', 'logits_head'):
        if key not in config:
            continue
        head = dict(config[key], start=0, num_classes=sizes.classes)
        projected = head['projection'].get('layers') != 0
        wide = dict(backbone=WIDTHS[-1], decoder=256, logits=sizes.classes)[
            head.get('features', 'backbone')]
        head['in_channels'] = wide
        if projected and head.get('features', 'backbone') == 'backbone':
            head.update(in_channels=list(WIDTHS), in_index=[0, 1, 2, 3],
                        input_transform='resize_concat')
        if not projected:
            head['channels'] = wide
        elif width:
            head.update(channels=int(width), projection=dict(
                head['projection'], hidden_channels=int(width)))
        objectives[f'contrast_{len(heads)}'] = dict(
            config.objective, head=f'aux_{len(heads)}')
        heads.append(head)
    return heads, objectives


def step_batch(sizes: StepSizes) -> dict[str, Any]:
    """Random images; the source's labels are in blocks of 32 pixels."""
    draw = generator()
    side = sizes.side
    batch: dict[str, Any] = dict(inputs={}, data_samples={})
    for stream in ('source', 'target'):
        batch['inputs'][stream] = [
            torch.randint(0, 256, (3, side, side), generator=draw,
                          dtype=torch.uint8) for _ in range(sizes.samples)]
        samples = []
        for _ in range(sizes.samples):
            one = SegDataSample(metainfo=dict(
                img_shape=(side, side), ori_shape=(side, side),
                pad_shape=(side, side)))
            if stream == 'source':
                one.gt_sem_seg = PixelData(data=blocks(
                    sizes.classes, (side, side), draw).unsqueeze(0))
            samples.append(one)
        batch['data_samples'][stream] = samples
    return batch


class Training:
    """A model that is trained on one batch, by DACS and contrast.

    Args:
        method (str, optional): See :func:`contrast_parts`. None: DACS alone.
        sizes (StepSizes): Of the step.
        device (str): 'cpu' or 'cuda'.
    """

    def __init__(self, method: str | None, sizes: StepSizes, device: str
                 ) -> None:
        torch.manual_seed(0)
        heads, objectives = [], {}
        if method is not None:
            heads, objectives = contrast_parts(method, sizes)
        dacs = Config.fromfile(
            ROOT / 'configs' / '_base_' / 'uda' / 'dacs.py').uda
        self.model = MODELS.build(dict(
            dacs, type='UDASegmentor', segmentor=segformer_b0(sizes, heads),
            objectives=dict(dacs.objectives, **objectives))).to(device)
        self.model.init_weights()
        self.model.train()
        # So small that the weights stay what they are.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-9)
        self.batch = step_batch(sizes)

    def step(self) -> None:
        """One iteration."""
        data = self.model.data_preprocessor(self.batch, True)
        losses = self.model(**data, mode='loss')
        total, _ = self.model.parse_losses(losses)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    @property
    def teacher(self) -> nn.Module:
        """The moving average of the student."""
        return self.model.teachers['ema'].model

    def passes(self) -> dict[str, int]:
        """How often each backbone runs in a step."""
        counts = dict(student=0, teacher=0)

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                counts[name] += 1
            return hook

        hooks = [model.backbone.register_forward_hook(count(name))
                 for name, model in (('student', self.model.segmentor),
                                     ('teacher', self.teacher))]
        self.step()
        for hook in hooks:
            hook.remove()
        return counts


class Parts:
    """What contrast computes in a step, to be run again part by part.

    It records what the heads are asked for in one step. A part runs with the
    same arguments, cut off from the rest of the graph, and with the backward
    of what has one.

    Args:
        training (Training): With contrast.
    """

    NAMES = ('labels', 'sampler', 'bank', 'kernel', 'projection')

    def __init__(self, training: Training) -> None:
        self.calls: dict[str, list[tuple[nn.Module, tuple, dict]]] = {
            name: [] for name in (
                'pixels', 'contrast', 'update_bank', 'project')}
        heads = [model.auxiliary_head[i]
                 for model in (training.model.segmentor, training.teacher)
                 for i in range(len(training.model.segmentor.auxiliary_head))]
        for head in heads:
            for name in self.calls:
                setattr(head, name, self._recorded(head, name))
        training.step()
        for head in heads:
            for name in self.calls:
                delattr(head, name)

    def _recorded(self, head: nn.Module, name: str) -> Callable[..., Any]:
        original = getattr(head, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name].append((
                head, *cut((args, kwargs), torch.is_grad_enabled())))
            return original(*args, **kwargs)

        return call

    @torch.no_grad()
    def labels(self) -> None:
        """Labels, and logits where they are asked for, at a smaller size."""
        for head, args, kwargs in self.calls['pixels']:
            head.pixels(*args, **kwargs)

    @torch.no_grad()
    def sampler(self) -> None:
        """Anchors of all views."""
        for head, (pixels, draws, *_), _ in self.calls['contrast']:
            head.sampler(
                pixels.labels, head.sampler.draw(pixels.labels, draws),
                pixels.logits, head.num_classes, head.ignore_index)

    def bank(self) -> None:
        """The update of the bank."""
        for head, args, kwargs in self.calls['update_bank']:
            head.update_bank(*args, **kwargs)

    def kernel(self) -> None:
        """Sampler and loss, forward and backward."""
        for head, args, kwargs in self.calls['contrast']:
            leaves = [one.embeddings for one in (*args, *kwargs.values())
                      if hasattr(one, 'embeddings')]
            _backward(head.contrast(*args, **kwargs),
                      [*leaves, *head.bank.parameters()])

    def projection(self) -> None:
        """Forward and, for the student's, backward."""
        for head, (features, ), _ in self.calls['project']:
            _backward(head.project(features),
                      [*features, *head.projection.parameters()])

    def functions(self) -> dict[str, Callable[[], None]]:
        """All parts by name."""
        return {name: getattr(self, name) for name in self.NAMES}


def _backward(result: Tensor, leaves: Sequence[Tensor]) -> None:
    needing = [one for one in leaves if one.requires_grad]
    if result.requires_grad and needing:
        torch.autograd.grad(result, needing, torch.ones_like(result),
                            allow_unused=True)


def measure_step(methods: Sequence[str], sizes: StepSizes, timer: Timer,
                 sync_check: bool = False) -> list[dict[str, Any]]:
    """Time of DACS, of DACS with each method, and of the method's parts.

    Returns:
        list[dict]: The first row is DACS alone. ``shares`` are relative to
        it; 'together' is labels, sampler, bank and kernel, 'rest' what the
        whole step costs beyond DACS, these and the projection: more passes,
        and passes that reach further.
    """
    plain = Training(None, sizes, timer.device)
    before = plain.passes()
    functions: dict[str, Callable[[], Any]] = {'': plain.step}
    extra = {}
    for method in methods:
        training = Training(method, sizes, timer.device)
        extra[method] = {name: number - before[name]
                         for name, number in training.passes().items()}
        parts = Parts(training).functions()
        if sync_check:
            forbid_waiting(parts.values())
        functions[method] = training.step
        functions.update({f'{method} {name}': part
                          for name, part in parts.items()})
    seconds = timer.in_turns(functions)
    rows: list[dict[str, Any]] = [dict(
        method='DACS', seconds=asdict(Spread.of(seconds[''])), passes=before)]
    for method in methods:
        spent = {name: seconds[f'{method} {name}'] for name in Parts.NAMES}
        # The sampler is timed twice, by itself and before the loss.
        spent['kernel'] = [max(0., a - b) for a, b in zip(
            spent['kernel'], spent['sampler'], strict=True)]
        spent['together'] = [sum(turn) for turn in zip(*(
            spent[name] for name in Parts.NAMES[:4]), strict=True)]
        spent['rest'] = [whole - dacs - a - b for whole, dacs, a, b in zip(
            seconds[method], seconds[''], spent['together'],
            spent['projection'], strict=True)]
        rows.append(dict(
            method=method, seconds=asdict(Spread.of(seconds[method])),
            extra_passes=extra[method],
            shares={name: asdict(ratios(times, seconds['']))
                    for name, times in spent.items()}))
    return rows


def step_table(rows: list[dict[str, Any]]) -> str:
    """Of :func:`measure_step`."""
    names = ('labels', 'sampler', 'bank', 'kernel', 'together', 'projection',
             'rest')
    dacs, *others = rows
    lines = [('DACS', Spread(**dacs['seconds']).text(),
              *['-'] * (len(names) + 1))]
    for row in others:
        passes = ', '.join(f'{number} {name}' for name, number in
                           row['extra_passes'].items() if number)
        lines.append((
            row['method'], Spread(**row['seconds']).text(),
            *(f'{100 * row["shares"][name]["median"]:.1f} %'
              for name in names), passes or 'none'))
    return table(('method', 'step, seconds', *names, 'more passes'), lines)


def run_contrast_step(args: argparse.Namespace) -> None:
    """What contrast adds to a step of DACS."""
    sizes = read_sizes(args.sizes, StepSizes)
    init_default_scope('mmseg')
    logging.disable(logging.INFO)  # each weight's initialisation
    for method in args.methods:  # a wrong name is told before it takes time
        contrast_parts(method, sizes)
    timer = Timer(args.device, args.repeats, args.clock)
    result = dict(circumstances(timer, LIBRARY), sizes=asdict(sizes))
    print(f'\nDACS, SegFormer-B0, {sizes.side} x {sizes.side}, '
          f'{sizes.samples} + {sizes.samples} images; {in_words(result)}\n',
          flush=True)
    rows = measure_step(args.methods, sizes, timer, args.sync_check)
    if args.sync_check:
        print('No part waits for the GPU.\n')
    result['step'] = rows
    print(step_table(rows))
    result['targets'] = [dict(
        what=f'{row["method"]}: labels, sampler, bank and kernel', most=True,
        reached=row['shares']['together']['median'], target=TARGET)
        for row in rows[1:]]
    judge(result['targets'])
    print('\n' + table_of_targets(result['targets']))
    write_json(args.json, result)
