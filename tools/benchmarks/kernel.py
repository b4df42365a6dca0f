"""The contrast kernel, and what it is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmseg_contrast import ops

from .draws import generator
from .memory import peak_in_new_process
from .report import mebibytes, number, table
from .timing import Spread, Timer, ratios

ABSENT = -float('inf')
BASELINE = 'dense autograd'
LIBRARY = 'pytorch-metric-learning'


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
