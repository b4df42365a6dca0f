"""The command step: a whole step, and the passes that it cannot do without."""

from __future__ import annotations

import argparse
import gc
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import mmcv
import mmengine
import mmseg
import torch
from mmengine.config import DictAction

import mmseg_contrast

from .arguments import add_common, positive
from .memory import peak_in_new_process, resident
from .pieces import Part, Pass, Pieces
from .report import (
    circumstances,
    in_words,
    judge,
    mebibytes,
    table,
    table_of_targets,
    write_json,
)
from .timing import Spread, Timer, forbid_waiting, ratios
from .training import Setup, Training

#: Largest ratio of a step to the sum of its passes.
TARGETS = dict(cpu=1.10, cuda=1.05)
PRECISIONS = ('float32', 'bfloat16', 'float16')


def add_command(commands: Any) -> None:
    """Tell the command line of it."""
    parser = commands.add_parser(
        'step', help="a config's step, and the passes it can't do without")
    parser.set_defaults(run=run_step)
    parser.add_argument(
        '--config', nargs='+', required=True, metavar='FILE',
        help='configs of a UDASegmentor; neither data nor weights are read')
    parser.add_argument(
        '--crop', nargs=2, type=positive, metavar=('HEIGHT', 'WIDTH'),
        help="of the source's images; other sizes in pixels change alike")
    parser.add_argument(
        '--batch', type=positive, metavar='N', help='images of each stream')
    parser.add_argument(
        '--amp', default='float32', choices=PRECISIONS,
        help='float32, or mixed precision on a GPU')
    parser.add_argument(
        '--compile', action='store_true', help='with CompileHook')
    parser.add_argument(
        '--no-memory', action='store_true', help='do not measure memory')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={},
        metavar='KEY=VALUE', help='override settings of all configs')
    add_common(parser)


def run_step(args: argparse.Namespace) -> None:
    """A table for each config."""
    if args.amp != 'float32' and args.device != 'cuda':
        raise SystemExit(
            f'--amp {args.amp} needs --device cuda: mixed precision of '
            'mmengine works on a GPU alone.')
    logging.disable(logging.INFO)  # each weight's initialisation
    setups = [Setup(config, args.cfg_options, args.crop and tuple(args.crop),
                    args.batch, args.device, args.amp, args.compile)
              for config in args.config]
    for setup in setups:  # a wrong one is told before it takes time
        setup.read()
    timer = Timer(args.device, args.repeats, args.clock)
    result = circumstances(timer)
    result['versions'] |= dict(
        mmengine=mmengine.__version__, mmcv=mmcv.__version__,
        mmsegmentation=mmseg.__version__,
        mmseg_contrast=mmseg_contrast.__version__)
    result.update(
        gpu=torch.cuda.get_device_name() if args.device == 'cuda' else None,
        command=shlex.join(
            ['python', 'tools/benchmark.py', *sys.argv[1:]]),
        steps=[])
    print(f'\n    {result["command"]}\n\n' + ', '.join(
        f'{name} {version}' for name, version in result['versions'].items())
        + f'; {result["gpu"] or "no GPU"}; {in_words(result)}', flush=True)
    for setup in setups:
        row = measure_step(setup, timer, args.sync_check)
        row['peak'] = None if args.no_memory else peak_in_new_process(
            dict(part='step', setup=asdict(setup)))
        result['steps'].append(row)
        print('\n' + step_table(row), flush=True)
        gc.collect()
    result['targets'] = [dict(
        what=f'{row["config"]}: step / sum of its passes', most=True,
        reached=row['ratio']['median'], target=TARGETS[args.device])
        for row in result['steps']]
    judge(result['targets'])
    print('\n' + table_of_targets(result['targets']))
    write_json(args.json, result)


def measure_step(setup: Setup, timer: Timer, sync_check: bool = False
                 ) -> dict[str, Any]:
    """Time of a step, of its passes and of the parts of the rest.

    Args:
        setup (Setup): What is trained.
        timer (Timer): How it is measured.
        sync_check (bool): Whether first a step runs in which waiting for the
            GPU is an error; its batch is there already.

    Returns:
        dict: ``passes`` and ``parts`` as rows, ``sum`` of the passes,
        ``remainder`` of the step without passes and parts, in seconds;
        ``ratio`` of step and sum.
    """
    training = Training(setup)
    with training.running():
        training.step()
        if sync_check:
            check_syncs(training)
        pieces = Pieces(training)
        passes, parts = pieces.passes(), pieces.parts()
        flops = {name: one.flops() for name, one in passes.items()}
        functions = functions_of(passes, parts)
        seconds = timer.in_turns(
            {'': training.step, **functions}, pieces.prepare)
    return dict(
        config=setup.config, crops=training.sizes, images=training.images,
        setup=asdict(setup),
        **summary(seconds, list(passes), list(parts), flops,
                  training.images))


def functions_of(passes: dict[str, Pass], parts: dict[str, Part]
                 ) -> dict[str, Callable[[], None]]:
    """All that is measured besides the step, by name.

    What is taken off a part runs right after it, as ``-name``.
    """
    found: dict[str, Callable[[], None]] = dict(passes)
    for name, part in parts.items():
        found[name] = part.run
        if part.beyond is not None:
            found[f'-{name}'] = part.beyond
    return found


def summary(seconds: dict[str, list[float]], passes: Sequence[str],
            parts: Sequence[str], flops: dict[str, int], images: int
            ) -> dict[str, Any]:
    """What follows from the seconds of each turn.

    Args:
        seconds (dict): By name, of each turn; that of the step is ''.
        passes (Sequence[str]): Names of passes.
        parts (Sequence[str]): Names of parts; '-name' is taken off.
        flops (dict): Of the forward of each pass.
        images (int): Of a step.
    """
    step = seconds['']
    spent = {name: seconds[name] for name in passes}
    for name in parts:
        spent[name] = [a - b for a, b in zip(
            seconds[name], seconds.get(f'-{name}', [0.] * len(step)),
            strict=True)]
    turns = range(len(step))
    together = [sum(spent[name][i] for name in passes) for i in turns]
    remainder = [step[i] - together[i] - sum(
        spent[name][i] for name in parts) for i in turns]

    def row(times: Sequence[float]) -> dict[str, Any]:
        return dict(seconds=asdict(Spread.of(times)),
                    share=asdict(ratios(times, step)))

    return dict(
        passes=[dict(name=name, gflop=flops[name] / 1e9, **row(spent[name]))
                for name in passes],
        sum=row(together),
        parts=[dict(name=name, **row(spent[name])) for name in parts],
        remainder=row(remainder),
        step=row(step),
        ratio=asdict(ratios(step, together)),
        images_per_second=images / Spread.of(step).median)


def step_table(row: dict[str, Any]) -> str:
    """Of :func:`measure_step`."""
    def line(name: str, one: dict[str, Any], gflop: str = '') -> list[str]:
        return [name, Spread(**one['seconds']).text(1e3, 1),
                f'{100 * one["share"]["median"]:.1f} %', gflop]

    lines = [line(one['name'], one, f'{one["gflop"]:.2f}')
             for one in row['passes']]
    lines.append(line('**passes together**', row['sum'], '{:.2f}'.format(
        sum(one['gflop'] for one in row['passes']))))
    lines += [line(one['name'], one) for one in row['parts']]
    lines.append(line('remainder', row['remainder']))
    lines.append(line('**step**', row['step']))
    crops = ', '.join(f'{name} {height} x {width}' for name, (height, width)
                      in row['crops'].items())
    setup = row['setup']
    return (
        f'{row["config"]}: {crops}; {row["images"]} images, {setup["amp"]}'
        f'{", compiled" if setup["compiled"] else ""}\n\n'
        + table(('', 'ms', 'of the step', 'GFLOP forward'), lines)
        + f'\n\nThe step takes {Spread(**row["ratio"]).text(digits=3)} of its '
        f'passes; {row["images_per_second"]:.2f} images/s; peak memory '
        f'{mebibytes(row["peak"])} MiB.')


def check_syncs(training: Training) -> None:
    """A step by :func:`forbid_waiting`, with its batch on the GPU already.

    Args:
        training (Training): That has stepped before.
    """
    host = training.batch
    training.batch = training.model.data_preprocessor.cast_data(host)
    try:
        training.step()
        forbid_waiting([training.step])
    finally:
        training.batch = host


def peak_of(case: dict[str, Any]) -> int:
    """Peak bytes of training, with weights and states of the optimizer.

    Args:
        case (dict): With ``setup``.
    """
    setup = Setup(**case['setup'])
    logging.disable(logging.INFO)
    before = resident('VmRSS') if setup.device == 'cpu' else 0
    training = Training(setup)
    with training.running():
        for _ in range(2):
            training.step()
        if setup.device == 'cpu':
            return resident('VmHWM') - before
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        training.step()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
