"""Measure what contrast costs, and what its parts cost otherwise.

    python tools/benchmark.py contrast
    python tools/benchmark.py contrast --device cuda --json contrast.json
    python tools/benchmark.py contrast --sizes anchors=256 length=500
    python tools/benchmark.py contrast-step --methods sepico-dist spcl

What is compared runs in turns in the same process (A B C A B C ...), and a
ratio is the median of the ratios of the turns: other work on the machine
slows down all of a turn. In brackets are the quartiles. On a busy machine
``--threads 1 --clock process`` counts the seconds of the processor that were
spent here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

import mmseg_contrast  # noqa: E402, F401, I001  its import error comes first
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmseg_contrast import ops  # noqa: E402

ABSENT = -float('inf')
BASELINE = 'dense autograd'
LIBRARY = 'pytorch-metric-learning'
#: Largest shares of the dense form's time and peak memory.
TARGETS = dict(cpu=(0.7, 0.25), cuda=(0.35, 0.1))
#: How many times faster than the form of size N x C x D.
MOMENTS_TARGET = 200
#: Largest share of a DACS step for labels, sampler, bank and kernel.
STEP_TARGET = 0.1
STEP_METHODS = ('spcl', 'sdca', 'sepico-proto', 'sepico-dist',
                'sepico-dist@128', 'sepico-bank', 'contrastive-seg',
                'contrastive-seg-memory')
#: Widths of SegFormer-B0's four outputs.
WIDTHS = (32, 64, 160, 256)


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


@dataclass(frozen=True)
class Timer:
    """How it is measured.

    Args:
        device (str): 'cpu' or 'cuda'.
        repeats (int): Number of turns.
        clock (str): 'wall', or 'process': the processor's seconds of all
            threads.
    """

    device: str
    repeats: int
    clock: str

    def elapsed(self, function: Callable[[], Any]) -> float:
        """Seconds until the device is done."""
        now = (time.perf_counter if self.clock == 'wall'
               else time.process_time)
        if self.device == 'cuda':
            torch.cuda.synchronize()
        start = now()
        function()
        if self.device == 'cuda':
            torch.cuda.synchronize()
        return now() - start

    def in_turns(self, functions: dict[str, Callable[[], Any]]
                 ) -> dict[str, list[float]]:
        """Seconds of each in each turn, after one turn to warm up."""
        for function in functions.values():
            self.elapsed(function)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                seconds[name].append(self.elapsed(function))
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
    case = dict(case, threads=torch.get_num_threads())
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


def measure_kernel(sizes: Sizes, timer: Timer, memory: bool
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
            problem = make_problem(sizes, live, timer.device)
            want = with_gradients(LOSSES[BASELINE], problem, own)
            errors = {name: difference(with_gradients(
                LOSSES[name], problem, own), want) for name in names}
            del want
            seconds = timer.in_turns({
                name: partial(with_gradients, LOSSES[name], problem, own)
                for name in names})
            case = dict(part='kernel', own=own, live=live, device=timer.device,
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


def measure_moments(sizes: Sizes, timer: Timer, memory: bool
                    ) -> list[dict[str, Any]]:
    """Time, memory and result of both ways to get class statistics.

    Returns:
        list[dict]: Two rows; ``times_faster`` is relative to the form of
        size N x C x D. ``pixels`` is less than asked for where that form
        does not fit into the memory.
    """
    while sizes.pixels > 1 and expanded_bytes(sizes) > available_memory(
            timer.device):
        sizes = replace(sizes, pixels=sizes.pixels // 2)
    features, labels = make_pixels(sizes, timer.device)
    results = {name: function(features, labels, sizes.classes)
               for name, function in MOMENTS.items()}
    error = difference(*([one.double() for one in results[name]]
                         for name in ('ours', 'N x C x D')))
    seconds = timer.in_turns({
        name: partial(function, features, labels, sizes.classes)
        for name, function in MOMENTS.items()})
    case = dict(part='moments', device=timer.device, sizes=asdict(sizes))
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


def measure_growth(sizes: Sizes, timer: Timer) -> list[dict[str, Any]]:
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
            problems[name] = make_problem(own, False, timer.device)
            counts[name] = own
    seconds = timer.in_turns({
        name: partial(with_gradients, class_form, problem, 'positive')
        for name, problem in problems.items()})
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


# -------------------------------------------------------------- a whole step


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
    side, blocks = sizes.side, -(-sizes.side // 32)
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
                labels = torch.randint(
                    0, sizes.classes, (1, blocks, blocks), generator=draw)
                labels = labels.repeat_interleave(32, 1).repeat_interleave(
                    32, 2)[:, :side, :side]
                one.gt_sem_seg = PixelData(data=labels)
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
                head, *_cut((args, kwargs), torch.is_grad_enabled())))
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


def _cut(value: Any, recording: bool) -> Any:
    """Arguments without their history, as leaves of a new graph."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point() and value.requires_grad
        return value.detach().requires_grad_(recording and floating)
    if isinstance(value, dict):
        return {key: _cut(one, recording) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(one, recording) for one in value)
    if hasattr(value, 'embeddings'):
        return replace(value, **{
            one.name: _cut(getattr(value, one.name), recording)
            for one in fields(value)})
    return value


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
    judge(found)
    return found


def judge(targets: list[dict[str, Any]]) -> None:
    """Say of each whether it was met."""
    for one in targets:
        one['met'] = (one['reached'] <= one['target'] if one['most']
                      else one['reached'] >= one['target'])


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
    """Run our forms and statistics by :func:`forbid_waiting`."""
    features, labels = make_pixels(sizes, 'cuda')
    problems = [make_problem(sizes, live, 'cuda') for live in (False, True)]
    forbid_waiting([
        partial(ops.class_moments, features, labels, sizes.classes),
        *(partial(with_gradients, loss, problem, own)
          for problem in problems for loss in OURS.values()
          for own in ('positive', 'energy'))])


def forbid_waiting(functions: Iterable[Callable[[], Any]]) -> None:
    """Run each once on a GPU, where waiting for it is an error.

    Raises:
        RuntimeError: By torch, at the first operation that waits.
    """
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode('error')
        for function in functions:
            function()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def run_contrast(args: argparse.Namespace) -> None:
    """Kernel, class statistics and growth."""
    sizes = read_sizes(args.sizes, Sizes)
    if args.sync_check:
        check_syncs(sizes)
        print('No part waits for the GPU.')
    memory = not args.no_memory
    timer = Timer(args.device, args.repeats, args.clock)
    result: dict[str, Any] = dict(
        asdict(timer), threads=torch.get_num_threads(), versions=versions(),
        sizes=asdict(sizes))
    if not has_library():
        print(f'{LIBRARY} cannot be imported: its rows are left out.')
    keys = sizes.classes * sizes.length
    print(f'\n{sizes.anchors} anchors, {keys} keys, {sizes.channels} '
          f'channels, tau {sizes.tau:g}; {args.device}, '
          f'{result["threads"]} threads, {args.repeats} turns, '
          f'{args.clock} clock\n', flush=True)
    result['kernel'] = measure_kernel(sizes, timer, memory)
    print(kernel_table(result['kernel']), flush=True)
    result['moments'] = measure_moments(sizes, timer, memory)
    print(f'\nClass statistics, {sizes.classes} classes, '
          f'{sizes.moment_channels} channels; the features are '
          f'{mebibytes(result["moments"][0]["features"])} MiB\n')
    if result['moments'][0]['pixels'] < sizes.pixels:
        print(f'{sizes.pixels} pixels x C x D do not fit into the memory.\n')
    print(moments_table(result['moments']), flush=True)
    result['growth'] = measure_growth(sizes, timer)
    print('\nGrowth of the class form\n\n' + growth_table(result['growth']))
    result['targets'] = check_targets(result)
    print('\n' + target_table(result['targets']))
    write_json(args.json, result)


def run_contrast_step(args: argparse.Namespace) -> None:
    """What contrast adds to a step of DACS."""
    sizes = read_sizes(args.sizes, StepSizes)
    init_default_scope('mmseg')
    logging.disable(logging.INFO)  # each weight's initialisation
    for method in args.methods:  # a wrong name is told before it takes time
        contrast_parts(method, sizes)
    timer = Timer(args.device, args.repeats, args.clock)
    result: dict[str, Any] = dict(
        asdict(timer), threads=torch.get_num_threads(), versions=versions(),
        sizes=asdict(sizes))
    print(f'\nDACS, SegFormer-B0, {sizes.side} x {sizes.side}, '
          f'{sizes.samples} + {sizes.samples} images; {args.device}, '
          f'{result["threads"]} threads, {args.repeats} turns, '
          f'{args.clock} clock\n', flush=True)
    rows = measure_step(args.methods, sizes, timer, args.sync_check)
    if args.sync_check:
        print('No part waits for the GPU.\n')
    result['step'] = rows
    print(step_table(rows))
    result['targets'] = [dict(
        what=f'{row["method"]}: labels, sampler, bank and kernel', most=True,
        reached=row['shares']['together']['median'], target=STEP_TARGET)
        for row in rows[1:]]
    judge(result['targets'])
    print('\n' + target_table(result['targets']))
    write_json(args.json, result)


def run_peak(args: argparse.Namespace) -> None:
    """Peak memory of one case, in bytes, on the last line."""
    case = json.loads(args.case)
    torch.set_num_threads(case['threads'])
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


SizesT = TypeVar('SizesT', Sizes, StepSizes)


def read_sizes(pairs: Sequence[str], kind: type[SizesT]) -> SizesT:
    """Sizes from ``name=value``.

    Raises:
        SystemExit: If a name is not known or a value is no number above 0.
    """
    known = {one.name: type(one.default) for one in fields(kind)}
    given = {}
    for pair in pairs:
        name, _, value = pair.partition('=')
        try:
            given[name] = known[name](value)
        except (KeyError, ValueError):
            raise SystemExit(
                f'--sizes {pair} must be name=number with a name out of '
                f'{", ".join(known)}.') from None
        if given[name] <= 0:
            raise SystemExit(f'--sizes {pair} must be above 0.')
    return kind(**given)


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
        '--no-memory', action='store_true', help='do not measure memory')
    step = commands.add_parser(
        'contrast-step', help='what contrast adds to a step of DACS')
    step.set_defaults(run=run_contrast_step)
    step.add_argument(
        '--methods', nargs='+', default=list(STEP_METHODS), metavar='NAME',
        help='files of configs/_base_/contrast; NAME@D for a projection to D '
        'channels; ' + ' '.join(STEP_METHODS))
    for command, kind in ((contrast, Sizes), (step, StepSizes)):
        command.add_argument(
            '--sizes', nargs='+', default=[], metavar='NAME=NUMBER',
            help='other sizes than ' + ' '.join(
                f'{one.name}={one.default:g}' for one in fields(kind)))
        command.add_argument(
            '--device', default='cpu', choices=('cpu', 'cuda'))
        command.add_argument(
            '--repeats', type=positive, default=9, help='turns, 9')
        command.add_argument(
            '--clock', default='wall', choices=('wall', 'process'),
            help='time that goes by, or that the processor spends here')
        command.add_argument(
            '--threads', type=positive, help='of torch on the CPU')
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
    if device == 'cuda' and args.clock == 'process':
        parser.error('--clock process counts nothing that a GPU does.')
    if getattr(args, 'sync_check', False) and device != 'cuda':
        parser.error('--sync-check needs --device cuda.')
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    if getattr(args, 'threads', None):
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == '__main__':
    main()
