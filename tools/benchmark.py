"""Measure what contrast costs, and what its parts cost otherwise.

    python tools/benchmark.py contrast
    python tools/benchmark.py contrast --device cuda --json contrast.json
    python tools/benchmark.py contrast --sizes anchors=256 length=500

What is compared runs in turns in the same process (A B C A B C ...), and a
ratio is the median of the ratios of the turns: other work on the machine
slows down all of a turn. In brackets are the quartiles.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from mmseg_contrast import ops  # noqa: E402

ABSENT = -float('inf')
BASELINE = 'dense autograd'
LIBRARY = 'pytorch-metric-learning'
#: Largest shares of the dense form's time and peak memory.
TARGETS = dict(cpu=(0.7, 0.25), cuda=(0.35, 0.1))
#: How many times faster than the form of size N x C x D.
MOMENTS_TARGET = 200


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        anchors (int): N of the kernel.
        classes (int): C.
        length (int): Keys of each class.
        channels (int): D of the kernel.
        tau (float): Temperature.
        pixels (int): N of the class statistics.
        moment_channels (int): D of the class statistics.
    """

    anchors: int = 1024
    classes: int = 19
    length: int = 2000
    channels: int = 256
    tau: float = 0.1
    pixels: int = 51200
    moment_channels: int = 512


# -------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of measured values, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(
            values, n=4, method='inclusive')
        return cls(middle, low, high)

    def text(self, factor: float = 1., digits: int = 2) -> str:
        """As it stands in a table."""
        median, low, high = (f'{factor * one:.{digits}f}' for one in (
            self.median, self.low, self.high))
        return f'{median} ({low}-{high})'


def elapsed(function: Callable[[], Any], device: str) -> float:
    """Seconds until the device is done."""
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int,
             device: str) -> dict[str, list[float]]:
    """Seconds of each function in each turn, after one turn to warm up."""
    for function in functions.values():
        elapsed(function, device)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(elapsed(function, device))
    return seconds


def ratios(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Spread of the ratios of the turns."""
    return Spread.of([a / b for a, b in zip(times, others, strict=True)])


def resident(key: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at most.

    Not getrusage: its maximum is inherited from the process that started
    this one.

    Raises:
        RuntimeError: If the system has no /proc.
    """
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError as error:
        raise RuntimeError('Peak memory on the CPU is read from /proc, which '
                           'only Linux has; use --no-memory.') from error
    return next(int(line.split()[1]) * 1024 for line in lines
                if line.startswith(key + ':'))


def peak_above(function: Callable[[], Any], device: str) -> int:
    """Peak bytes while a function runs, less those before.

    On the CPU only the first call of a process tells: memory that was freed
    may stay with the process.
    """
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident('VmRSS')
    function()
    return resident('VmHWM') - before


def peak_in_new_process(case: dict[str, Any]) -> int:
    """Peak bytes of a case in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, 'peak', json.dumps(case)],
        capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'Measuring the memory of {case} failed:\n'
                           f'{done.stderr}')
    return int(done.stdout.splitlines()[-1])


def available_memory(device: str) -> int:
    """Bytes that can still be used."""
    if device == 'cuda':
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines
                    if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')


def generator() -> torch.Generator:
    """Start of all random numbers: they are the same in each process."""
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------- kernel


@dataclass(frozen=True)
class Problem:
    """Anchors and keys, of length 1.

    Args:
        anchors (Tensor): ``(N, D)``, with gradients.
        labels (Tensor): int64, ``(N,)``.
        keys (Tensor): ``(C, L, D)``, with gradients if they are live.
        tau (float): Temperature.
    """

    anchors: Tensor
    labels: Tensor
    keys: Tensor
    tau: float

    @property
    def key_labels(self) -> Tensor:
        """int64, ``(C * L,)``."""
        classes, length, _ = self.keys.shape
        return torch.arange(
            classes, device=self.keys.device).repeat_interleave(length)

    @property
    def leaves(self) -> list[Tensor]:
        """What needs gradients."""
        return [one for one in (self.anchors, self.keys) if one.requires_grad]


def make_problem(sizes: Sizes, live: bool, device: str) -> Problem:
    """Random anchors and keys.

    Args:
        sizes (Sizes): How many.
        live (bool): Whether keys need gradients.
        device (str): 'cpu' or 'cuda'.
    """
    draw = generator()

    def unit(*shape: int) -> Tensor:
        return F.normalize(
            torch.randn(shape, generator=draw), dim=-1).to(device)

    labels = torch.randint(
        0, sizes.classes, (sizes.anchors, ), generator=draw).to(device)
    anchors = unit(sizes.anchors, sizes.channels).requires_grad_()
    keys = unit(sizes.classes, sizes.length, sizes.channels)
    return Problem(anchors, labels, keys.requires_grad_(live), sizes.tau)


def class_form(problem: Problem, own: str) -> Tensor:
    """Ours, for keys that are sorted by class."""
    keys = problem.keys
    filled = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
    return ops.class_contrast_loss(
        problem.anchors, problem.labels, keys, filled, problem.tau, own=own)


def pair_form(problem: Problem, own: str) -> Tensor:
    """Ours, for any relation of anchors and keys."""
    return ops.pair_contrast_loss(
        problem.anchors, problem.keys.flatten(0, 1),
        ops.same_label(problem.labels, problem.key_labels), problem.tau,
        own=own)


def dense(problem: Problem, own: str) -> Tensor:
    """The equation, written with the matrix of all similarities."""
    similar = problem.anchors @ problem.keys.flatten(0, 1).T / problem.tau
    positive = problem.labels.unsqueeze(1) == problem.key_labels
    if own == 'positive':
        others = similar.masked_fill(positive, ABSENT).logsumexp(
            1, keepdim=True)
        logs = torch.logaddexp(similar, others)
    else:
        logs = similar.logsumexp(1, keepdim=True)
    terms = (logs - similar).masked_fill(~positive, 0.)
    return (terms.sum(1) / positive.sum(1)).mean()


def dense_gathered(problem: Problem, own: str) -> Tensor:
    """The same, for sorted keys: only N x L terms, one of each positive."""
    classes, length, _ = problem.keys.shape
    similar = (problem.anchors @ problem.keys.flatten(0, 1).T / problem.tau
               ).view(-1, classes, length)
    index = problem.labels.view(-1, 1, 1)
    positives = similar.gather(1, index.expand(-1, 1, length)).squeeze(1)
    if own == 'positive':
        others = similar.scatter(
            1, index.expand(-1, 1, length), ABSENT).flatten(1).logsumexp(
                1, keepdim=True)
        return F.softplus(others - positives).mean()
    return (similar.flatten(1).logsumexp(1, keepdim=True) - positives).mean()


def metric_learning(problem: Problem, own: str) -> Tensor:
    """SupConLoss of pytorch-metric-learning, which is own = 'energy'."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss
    loss = SupConLoss(
        temperature=problem.tau,
        distance=DotProductSimilarity(normalize_embeddings=False))
    return loss(problem.anchors, problem.labels,
                ref_emb=problem.keys.flatten(0, 1),
                ref_labels=problem.key_labels)


Loss = Callable[[Problem, str], Tensor]
OURS: dict[str, Loss] = {
    'ours, class form': class_form,
    'ours, pair form': pair_form,
}
LOSSES: dict[str, Loss] = {
    BASELINE: dense,
    'dense, positives gathered': dense_gathered,
    **OURS,
    LIBRARY: metric_learning,
}


def has_library() -> bool:
    """Whether pytorch-metric-learning can be imported."""
    if importlib.util.find_spec('pytorch_metric_learning') is None:
        return False
    try:
        import pytorch_metric_learning.losses  # noqa: F401
    except ImportError:
        return False
    return True


def with_gradients(loss: Loss, problem: Problem, own: str) -> list[Tensor]:
    """Loss and its gradients, one forward and one backward."""
    value = loss(problem, own)
    return [value.detach(), *torch.autograd.grad(value, problem.leaves)]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item()
               for a, b in zip(some, others, strict=True))


def measure_kernel(sizes: Sizes, repeats: int, device: str, memory: bool
                   ) -> list[dict[str, Any]]:
    """Time, memory and result of each way to compute each loss.

    Returns:
        list[dict]: A row for each combination; ``time_ratio`` and
        ``peak_ratio`` are relative to the dense form.
    """
    rows = []
    for own in ('positive', 'energy'):
        names = [name for name in LOSSES if name != LIBRARY
                 or own == 'energy' and has_library()]
        for live in (False, True):
            problem = make_problem(sizes, live, device)
            want = with_gradients(LOSSES[BASELINE], problem, own)
            errors = {name: difference(with_gradients(
                LOSSES[name], problem, own), want) for name in names}
            del want
            seconds = in_turns(
                {name: partial(with_gradients, LOSSES[name], problem, own)
                 for name in names}, repeats, device)
            case = dict(part='kernel', own=own, live=live, device=device,
                        sizes=asdict(sizes))
            peaks = {name: peak_in_new_process(dict(case, name=name))
                     for name in names} if memory else {}
            for name in names:
                rows.append(dict(
                    own=own, keys='live' if live else 'detached', name=name,
                    seconds=asdict(Spread.of(seconds[name])),
                    time_ratio=asdict(ratios(
                        seconds[name], seconds[BASELINE])),
                    peak=peaks.get(name),
                    peak_ratio=peaks[name] / max(1, peaks[BASELINE])
                    if memory else None,
                    difference=errors[name]))
    return rows


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """Of :func:`measure_kernel`."""
    return table(
        ('own', 'keys', 'computed by', 'seconds', 'of dense', 'peak MiB',
         'of dense', 'difference'),
        [(row['own'], row['keys'], row['name'],
          Spread(**row['seconds']).text(digits=3),
          Spread(**row['time_ratio']).text(), mebibytes(row['peak']),
          number(row['peak_ratio']), f'{row["difference"]:.0e}')
         for row in rows])


# --------------------------------------------------------- class statistics


def expanded_moments(features: Tensor, labels: Tensor, num_classes: int
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """With tensors of size N x C x D, as SDCA's and SePiCo's code does."""
    shape = (len(features), num_classes, features.shape[1])
    member = (labels.unsqueeze(1) == torch.arange(
        num_classes, device=labels.device)).to(features.dtype)
    member = member.unsqueeze(2).expand(shape)
    sorted_features = features.unsqueeze(1).expand(shape) * member
    count = member.sum(0)
    mean = sorted_features.sum(0) / count.clamp_min(1)
    apart = sorted_features - mean.expand(shape) * member
    return count[:, 0], mean, apart.pow(2).mul(member).sum(0)


MOMENTS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    'N x C x D': expanded_moments,
    'ours': ops.class_moments,
}


def make_pixels(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Features of pixels and their labels, one in twenty ignored."""
    draw = generator()
    features = torch.randn(
        sizes.pixels, sizes.moment_channels, generator=draw)
    labels = torch.randint(
        0, sizes.classes, (sizes.pixels, ), generator=draw)
    labels[::20] = 255
    return features.to(device), labels.to(device)


def expanded_bytes(sizes: Sizes) -> int:
    """What :func:`expanded_moments` needs, with a margin."""
    return 5 * 4 * sizes.pixels * sizes.classes * sizes.moment_channels


def measure_moments(sizes: Sizes, repeats: int, device: str, memory: bool
                    ) -> list[dict[str, Any]]:
    """Time, memory and result of both ways to get class statistics.

    Returns:
        list[dict]: Two rows; ``times_faster`` is relative to the form of
        size N x C x D. ``pixels`` is less than asked for where that form
        does not fit into the memory.
    """
    while sizes.pixels > 1 and expanded_bytes(sizes) > available_memory(
            device):
        sizes = replace(sizes, pixels=sizes.pixels // 2)
    features, labels = make_pixels(sizes, device)
    results = {name: function(features, labels, sizes.classes)
               for name, function in MOMENTS.items()}
    error = difference(*([one.double() for one in results[name]]
                         for name in ('ours', 'N x C x D')))
    seconds = in_turns(
        {name: partial(function, features, labels, sizes.classes)
         for name, function in MOMENTS.items()}, repeats, device)
    case = dict(part='moments', device=device, sizes=asdict(sizes))
    return [dict(
        name=name, pixels=sizes.pixels,
        seconds=asdict(Spread.of(seconds[name])),
        times_faster=asdict(ratios(seconds['N x C x D'], seconds[name])),
        peak=peak_in_new_process(dict(case, name=name)) if memory else None,
        features=features.nbytes, difference=error if name == 'ours' else 0.)
        for name in MOMENTS]


def moments_table(rows: list[dict[str, Any]]) -> str:
    """Of :func:`measure_moments`."""
    return table(
        ('computed by', 'pixels', 'ms', 'times faster', 'peak MiB',
         'difference'),
        [(row['name'], str(row['pixels']),
          Spread(**row['seconds']).text(1e3, 1),
          Spread(**row['times_faster']).text(digits=0),
          mebibytes(row['peak']), f'{row["difference"]:.0e}')
         for row in rows])


# ------------------------------------------------------------------- growth


def measure_growth(sizes: Sizes, repeats: int, device: str
                   ) -> list[dict[str, Any]]:
    """Time of our class form at a quarter, once and four times the sizes.

    Returns:
        list[dict]: A row for each size; ``per_pair`` is in seconds.
    """
    problems, counts = {}, {}
    for varied in ('anchors', 'length'):
        for factor in (1 / 4, 1, 4):
            own = replace(sizes, **{varied: max(
                1, round(factor * getattr(sizes, varied)))})
            name = f'{varied} {factor:g}'
            problems[name] = make_problem(own, False, device)
            counts[name] = own
    seconds = in_turns(
        {name: partial(with_gradients, class_form, problem, 'positive')
         for name, problem in problems.items()}, repeats, device)
    rows = []
    for name, own in counts.items():
        keys = own.classes * own.length
        spent = Spread.of(seconds[name])
        pairs = own.anchors * keys
        rows.append(dict(
            varied=name.split()[0], anchors=own.anchors, keys=keys,
            seconds=asdict(spent),
            per_pair=asdict(Spread(*(one / pairs for one in (
                spent.median, spent.low, spent.high))))))
    return rows


def growth_table(rows: list[dict[str, Any]]) -> str:
    """Of :func:`measure_growth`."""
    return table(
        ('anchors', 'keys', 'seconds', 'ns per anchor and key'),
        [(str(row['anchors']), str(row['keys']),
          Spread(**row['seconds']).text(digits=3),
          Spread(**row['per_pair']).text(1e9)) for row in rows])


# -------------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def mebibytes(size: int | None) -> str:
    """Of a number of bytes."""
    return '-' if size is None else f'{size / 2**20:.0f}'


def number(value: float | None) -> str:
    """With two digits, where there is one."""
    return '-' if value is None else f'{value:.2f}'


def check_targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at and what was reached.

    The kernel's rows are those of our own forms, relative to the dense one.

    Args:
        result (dict): With ``kernel``, ``moments`` and ``device``.
    """
    time_target, peak_target = TARGETS[result['device']]
    found = []
    for row in result['kernel']:
        if row['name'] not in OURS:
            continue
        what = f'{row["name"]}, own = {row["own"]}, {row["keys"]} keys'
        found.append(dict(
            what=f'{what}: time', reached=row['time_ratio']['median'],
            target=time_target, most=True))
        if row['peak_ratio'] is not None:
            found.append(dict(what=f'{what}: peak memory', most=True,
                              reached=row['peak_ratio'], target=peak_target))
    found.append(dict(
        what='class statistics: times faster', most=False,
        reached=result['moments'][-1]['times_faster']['median'],
        target=MOMENTS_TARGET))
    for one in found:
        one['met'] = (one['reached'] <= one['target'] if one['most']
                      else one['reached'] >= one['target'])
    return found


def target_table(targets: list[dict[str, Any]]) -> str:
    """Of :func:`check_targets`."""
    return table(
        ('what', 'target', 'reached', ''),
        [(one['what'],
          ('at most ' if one['most'] else 'at least ') + f'{one["target"]:g}',
          f'{one["reached"]:.3g}', 'met' if one['met'] else 'missed')
         for one in targets])


# ------------------------------------------------------------------ commands


def versions() -> dict[str, str | None]:
    """Of what the numbers depend on."""
    found: dict[str, str | None] = dict(
        python=platform.python_version(), torch=torch.__version__)
    try:
        found[LIBRARY] = importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        found[LIBRARY] = None
    return found


def check_syncs(sizes: Sizes) -> None:
    """Run our forms once on a GPU, where waiting for it is an error.

    Raises:
        RuntimeError: By torch, at the first operation that waits.
    """
    features, labels = make_pixels(sizes, 'cuda')
    problems = [make_problem(sizes, live, 'cuda') for live in (False, True)]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        ops.class_moments(features, labels, sizes.classes)
        for problem in problems:
            for loss in OURS.values():
                for own in ('positive', 'energy'):
                    with_gradients(loss, problem, own)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def run_contrast(args: argparse.Namespace) -> None:
    """Kernel, class statistics and growth."""
    sizes = read_sizes(args.sizes)
    if args.sync_check:
        check_syncs(sizes)
        print('No part waits for the GPU.')
    memory = not args.no_memory
    result: dict[str, Any] = dict(
        device=args.device, threads=torch.get_num_threads(),
        repeats=args.repeats, versions=versions(), sizes=asdict(sizes))
    if not has_library():
        print(f'{LIBRARY} cannot be imported: its rows are left out.')
    keys = sizes.classes * sizes.length
    print(f'\n{sizes.anchors} anchors, {keys} keys, {sizes.channels} '
          f'channels, tau {sizes.tau:g}; {args.device}, '
          f'{result["threads"]} threads, {args.repeats} turns\n')
    result['kernel'] = measure_kernel(
        sizes, args.repeats, args.device, memory)
    print(kernel_table(result['kernel']))
    result['moments'] = measure_moments(
        sizes, args.repeats, args.device, memory)
    print(f'\nClass statistics, {sizes.classes} classes, '
          f'{sizes.moment_channels} channels; the features are '
          f'{mebibytes(result["moments"][0]["features"])} MiB\n')
    if result['moments'][0]['pixels'] < sizes.pixels:
        print(f'{sizes.pixels} pixels x C x D do not fit into the memory.\n')
    print(moments_table(result['moments']))
    result['growth'] = measure_growth(sizes, args.repeats, args.device)
    print('\nGrowth of the class form\n\n' + growth_table(result['growth']))
    result['targets'] = check_targets(result)
    print('\n' + target_table(result['targets']))
    write_json(args.json, result)


def run_peak(args: argparse.Namespace) -> None:
    """Peak memory of one case, in bytes, on the last line."""
    case = json.loads(args.case)
    sizes, device = Sizes(**case['sizes']), case['device']
    tiny = replace(sizes, anchors=2, length=2, pixels=2)

    def work(sizes: Sizes) -> Callable[[], Any]:
        if case['part'] == 'kernel':
            loss = LOSSES[case['name']]
            problem = make_problem(sizes, case['live'], device)
            return partial(with_gradients, loss, problem, case['own'])
        return partial(MOMENTS[case['name']], *make_pixels(sizes, device),
                       sizes.classes)

    work(tiny)()  # code and threads are there before memory is counted
    print(peak_above(work(sizes), device))


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write results, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + '\n')


def read_sizes(pairs: Sequence[str]) -> Sizes:
    """Sizes from ``name=value``.

    Raises:
        SystemExit: If a name is not known or a value is no number.
    """
    known = {one.name: one.type for one in fields(Sizes)}
    given: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition('=')
        try:
            given[name] = (float if known[name] == 'float' else int)(value)
        except (KeyError, ValueError):
            raise SystemExit(
                f'--sizes {pair} must be name=number with a name out of '
                f'{", ".join(known)}.') from None
        if given[name] <= 0:
            raise SystemExit(f'--sizes {pair} must be above 0.')
    return Sizes(**given)


def positive(text: str) -> int:
    """A number of repeats."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError('must be at least 1')
    return value


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    contrast = commands.add_parser(
        'contrast', help='kernel, class statistics and growth')
    contrast.set_defaults(run=run_contrast)
    contrast.add_argument(
        '--sizes', nargs='+', default=[], metavar='NAME=NUMBER',
        help='other sizes than ' + ' '.join(
            f'{one.name}={one.default:g}' for one in fields(Sizes)))
    contrast.add_argument(
        '--no-memory', action='store_true', help='do not measure memory')
    for command in (contrast, ):
        command.add_argument(
            '--device', default='cpu', choices=('cpu', 'cuda'))
        command.add_argument(
            '--repeats', type=positive, default=9, help='turns, 9')
        command.add_argument(
            '--json', type=Path, metavar='FILE', help='write results there')
        command.add_argument(
            '--sync-check', action='store_true',
            help='first run all once where waiting for the GPU is an error')
    peak = commands.add_parser('peak', help='used by the others')
    peak.set_defaults(run=run_peak)
    peak.add_argument('case')
    args = parser.parse_args()
    device = getattr(args, 'device', 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU, and torch sees none.')
    if getattr(args, 'sync_check', False) and device != 'cuda':
        parser.error('--sync-check needs --device cuda.')
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    args.run(args)


if __name__ == '__main__':
    main()
