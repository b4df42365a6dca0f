"""Watches whether a contrast separates classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from ...models import ContrastHead
from ...ops.labels import ignored_last
from ..looking import bank_centres, chosen_heads
from .uda_visualization import class_colors

# Rows of the sums by class: anchors that have a centre of their own class, and
# the cosine with it; anchors that have other classes, the mean cosine with
# these, and the largest; anchors that have both, and what lies between.
(_HAS_OWN, _OWN, _HAS_OTHERS, _OTHERS, _NEAREST, _HAS_BOTH, _MARGIN
 ) = range(7)

Anchors = tuple[Tensor, Tensor]


def class_cosines(anchors: Tensor, labels: Tensor, centres: Tensor,
                  exists: Tensor, alone: Tensor | None = None) -> Tensor:
    r"""Cosines of anchors with their own class and with the others.

    With ``alone`` the centres are sums S over the anchors themselves, and an
    anchor a is compared with what the others of its class make:

    .. math::
        \cos(a, S - a) = (a \cdot S - 1) / \sqrt{|S|^2 - 2 a \cdot S + 1}

    Args:
        anchors (Tensor): Of length 1, ``(N, D)``.
        labels (Tensor): int64 ``(N,)``, in ``[0, C)``.
        centres (Tensor): Of any length, ``(C, D)``.
        exists (Tensor): Which classes have one, bool ``(C,)``.
        alone (Tensor, optional): Where the anchors are part of the centres:
            which classes have a single anchor, bool ``(C,)``.

    Returns:
        Tensor: ``(7, N)``, see the rows above; 0 where nothing exists.
    """
    cosines = anchors @ F.normalize(centres, dim=1).T
    own = cosines.gather(1, labels.unsqueeze(1)).squeeze(1)
    has_own = exists
    if alone is not None:
        has_own = exists & ~alone
        length = centres.norm(dim=1)[labels]
        dot = own * length
        rest = (length**2 - 2 * dot + 1).clamp_min(0).sqrt()
        own = (dot - 1) / rest.clamp_min(1e-6)
    others = exists & ~F.one_hot(labels, len(centres)).bool()
    number = others.sum(1)
    mean = (cosines * others).sum(1) / number.clamp_min(1)
    nearest = cosines.where(others, -torch.inf).amax(1)
    owns, against = has_own[labels], number > 0
    both = owns & against
    return torch.stack([
        owns, own.where(owns, 0.),
        against, mean, nearest.where(against, 0.),
        both, (own - nearest).where(both, 0.)])


@dataclass
class Sums:
    """What is summed over anchors, intervals and ranks.

    Args:
        classes (Tensor): See the rows above, float64 ``(7, C)``.
        anchors (Tensor): Their number, float64 ``(1,)``.
        first (Tensor): Sum of the unit anchors, float64 ``(D,)``.
        second (Tensor): Sum of their squares, float64 ``(D,)``.
        seen (Tensor): Anchors of each class in all iterations, ``(C,)``.
    """

    classes: Tensor
    anchors: Tensor
    first: Tensor
    second: Tensor
    seen: Tensor

    @classmethod
    def zeros(cls, num_classes: int, channels: int,
              device: torch.device | str = 'cpu') -> Sums:
        """No anchors.

        Args:
            num_classes (int): C.
            channels (int): D.
            device (torch.device or str): Where they are.
        """
        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(empty(7, num_classes), empty(1), empty(channels),
                   empty(channels), empty(num_classes))

    def parts(self) -> list[Tensor]:
        """All tensors."""
        return [self.classes, self.anchors, self.first, self.second,
                self.seen]

    def over_ranks(self) -> Sums:
        """Summed over ranks with one collective, on the host."""
        parts = self.parts()
        flat = torch.cat([part.flatten() for part in parts])
        all_reduce(flat)
        pieces = flat.cpu().split([part.numel() for part in parts])
        return Sums(*(piece.view(part.shape) for piece, part in zip(
            pieces, parts, strict=True)))

    def add(self, other: Sums) -> None:
        """Add other sums to these.

        Args:
            other (Sums): On the same device.
        """
        for mine, more in zip(self.parts(), other.parts(), strict=True):
            mine += more


@dataclass
class Health:
    """Numbers of one head; nan where nothing can be said.

    Args:
        positive (float): Mean cosine of anchors with their own class.
        negative (float): With other classes, the mean over these.
        nearest (float): With the nearest other class.
        margin (float): Own class less nearest other one.
        spread (float): Mean deviation of the unit anchors' entries; 0 is
            collapse, ``1 / sqrt(D)`` are directions all around.
        margins (Tensor): By class, ``(C,)``.
        seen (Tensor): Classes among the anchors, bool ``(C,)``.
        held (Tensor, optional): Classes in the bank, bool ``(C,)``; None
            for a bank without memory.
        ages (Tensor, optional): Updates since a class of the bank was last
            in one, ``(C,)``.
    """

    positive: float
    negative: float
    nearest: float
    margin: float
    spread: float
    margins: Tensor
    seen: Tensor
    held: Tensor | None = None
    ages: Tensor | None = None

    def scalars(self) -> dict[str, float]:
        """What there is to say, by name."""
        values = dict(
            positive_cosine=self.positive, negative_cosine=self.negative,
            nearest_cosine=self.nearest, margin=self.margin,
            spread=self.spread,
            anchor_coverage=float(self.seen.double().mean()))
        if self.held is not None:
            values['bank_coverage'] = float(self.held.double().mean())
        if self.ages is not None and self.held is not None and (
                self.held.any()):
            ages = self.ages[self.held].double()
            values['max_age'] = float(ages.max())
            values['mean_age'] = float(ages.mean())
        return {name: value for name, value in values.items()
                if value == value}


def judge(sums: Sums, held: Tensor | None, ages: Tensor | None) -> Health:
    """Turn sums into means.

    Args:
        sums (Sums): On the host.
        held (Tensor, optional): See :class:`Health`.
        ages (Tensor, optional): See there.
    """
    total = sums.classes.sum(1)
    margins = sums.classes[_MARGIN] / sums.classes[_HAS_BOTH]
    centre = sums.first / sums.anchors
    deviation = (sums.second / sums.anchors - centre**2).clamp_min(0).sqrt()
    return Health(
        positive=float(total[_OWN] / total[_HAS_OWN]),
        negative=float(total[_OTHERS] / total[_HAS_OTHERS]),
        nearest=float(total[_NEAREST] / total[_HAS_OTHERS]),
        margin=float(total[_MARGIN] / total[_HAS_BOTH]),
        spread=float(deviation.mean()), margins=margins,
        seen=sums.seen > 0, held=held, ages=ages)


@dataclass
class _Watch:
    """What is remembered of one head between reports."""

    head: ContrastHead
    seen: Tensor | None = None
    report: Sums | None = None
    low: int = 0
    warned: set[str] = field(default_factory=set)


@HOOKS.register_module()
class ContrastHealthHook(Hook):
    """Shows whether contrast separates classes, and warns where it doesn't.

    A falling loss is no proof: with a large temperature, or all embeddings
    in one direction, it falls too. Every ``interval`` iterations the
    visualizer gets for each ContrastHead, as ``contrast/<head>_...``:

    - ``positive_cosine``: of anchors with the centre of their own class;
      ``negative_cosine``: with those of other classes, the mean;
      ``nearest_cosine``: the largest of them;
    - ``margin``: positive less nearest, and ``spread``: the mean deviation
      of the entries of unit anchors (0 is collapse). These two are in the
      log's lines as well;
    - ``bank_coverage`` and ``anchor_coverage``: the share of the classes
      that the bank holds, and that were among anchors in the interval;
    - ``max_age`` and ``mean_age`` of the classes in the bank, in updates.

    Cosines and spread are of the anchors of the interval's last iteration.
    For a bank without memory (BatchBank) centres are those of the anchors,
    without the one that is compared. At each report one line goes to the
    log, and a warning for what is wrong, once until it has recovered.
    In other iterations the labels of anchors are counted on the device.

    Args:
        interval (int): Iterations between scalars.
        report_interval (int): Iterations between reports, a multiple of
            ``interval``.
        heads (Sequence[str], optional): Which, such as 'aux' or 'aux_1'.
            None: all.
        min_margin (float): A margin below it separates nothing.
        patience (int): Reports in a row for which the margin must be low.
        min_spread (float): Embeddings have collapsed below this part of
            ``1 / sqrt(D)``, the spread of directions all around.
        max_age (int): Updates that a class of the bank may be without a
            vector.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 interval: int = 50,
                 report_interval: int = 200,
                 heads: Sequence[str] | None = None,
                 min_margin: float = 0.01,
                 patience: int = 3,
                 min_spread: float = 0.02,
                 max_age: int = 1000) -> None:
        where = 'in custom_hooks'
        if interval < 1 or report_interval < 1 or report_interval % interval:
            raise ValueError(
                f'ContrastHealthHook.report_interval {where} must be a '
                f'multiple of interval, got {report_interval} and {interval}.')
        if isinstance(heads, str):
            raise ValueError(f'ContrastHealthHook.heads {where} must be a '
                             f'list of names, got {heads!r}.')
        for name, value in (('patience', patience), ('max_age', max_age)):
            if value < 1:
                raise ValueError(f'ContrastHealthHook.{name} {where} must '
                                 f'be >= 1, got {value}.')
        for key, part, top in (('min_margin', min_margin, 2),
                               ('min_spread', min_spread, 1)):
            if not 0 <= part < top:
                raise ValueError(f'ContrastHealthHook.{key} {where} must '
                                 f'lie in [0, {top}), got {part}.')
        self.interval = interval
        self.report_interval = report_interval
        self.heads = heads
        self.min_margin = min_margin
        self.patience = patience
        self.min_spread = min_spread
        self.max_age = max_age
        self._watches: dict[str, _Watch] = {}

    def before_train(self, runner: Runner) -> None:
        """Find the heads, and start to count.

        Raises:
            ValueError: If the model has no such ContrastHead.
        """
        heads = chosen_heads(runner.model, self.heads, 'ContrastHealthHook')
        self._watches = {name: _Watch(head) for name, head in heads.items()}
        number = max(head.num_classes for head in heads.values())
        self.classes, _ = class_colors(runner, number)

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Ask for the anchors, and let go of the last ones."""
        for watch in self._watches.values():
            watch.head.keep_anchors = True
            watch.head.last = None

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Count, and report at the end of an interval."""
        number = runner.iter + 1
        for name, watch in self._watches.items():
            self._count(watch)
            if number % self.interval == 0:
                self._flush(runner, name, watch, number)
            if number % self.report_interval == 0:
                self._tell(name, watch)

    def after_train(self, runner: Runner) -> None:
        """Let go of the last anchors."""
        for watch in self._watches.values():
            watch.head.keep_anchors = False
            watch.head.last = None

    def _count(self, watch: _Watch) -> None:
        """Count the classes of anchors, without waiting for the device."""
        head = watch.head
        for _, labels in _anchors(head):
            if watch.seen is None:
                # one more bin takes the ignored ones
                watch.seen = torch.zeros(
                    head.num_classes + 1, dtype=torch.float64,
                    device=labels.device)
            watch.seen.index_add_(
                0, ignored_last(labels, head.num_classes, head.ignore_index),
                torch.ones_like(labels, dtype=torch.float64))

    def _flush(self, runner: Runner, name: str, watch: _Watch,
               number: int) -> None:
        """Write the scalars of an interval."""
        sums = self._measure(watch)
        watch.seen = None
        health = judge(sums, *_memory(watch.head))
        if watch.report is None:
            watch.report = sums
        else:
            watch.report.add(sums)
        scalars = health.scalars()
        for key in ('margin', 'spread'):
            if key in scalars:
                runner.message_hub.update_scalar(
                    f'train/contrast.{name}.{key}', scalars[key])
        runner.visualizer.add_scalars(
            {f'contrast/{name}_{key}': value
             for key, value in scalars.items()}, step=number)

    def _measure(self, watch: _Watch) -> Sums:
        """Sums over the latest anchors of all ranks; all of them call it."""
        head = watch.head
        # A rank without anchors takes part, too.
        device = head.bank.age.device
        known = []
        for vectors, labels in _anchors(head):
            keep = ignored_last(labels, head.num_classes,
                                head.ignore_index) < head.num_classes
            known.append((F.normalize(vectors[keep].float(), dim=1),
                          labels[keep]))
        sums = Sums.zeros(head.num_classes, head.channels, device)
        memory = bank_centres(head)
        if memory is None:
            centres, exists, alone = _own_centres(sums, known)
        else:
            (centres, exists), alone = memory, None
        for vectors, labels in known:
            sums.classes.index_add_(1, labels, class_cosines(
                vectors, labels, centres.to(vectors), exists, alone).double())
            sums.anchors += len(vectors)
            sums.first += vectors.double().sum(0)
            sums.second += vectors.double().square().sum(0)
        if watch.seen is not None:
            sums.seen += watch.seen[:-1]
        return sums.over_ranks()

    def _tell(self, name: str, watch: _Watch) -> None:
        """Log one line, and warn of what is wrong."""
        assert watch.report is not None
        health = judge(watch.report, *_memory(watch.head))
        watch.report = None
        if not health.seen.any():
            print_log(f'contrast of {name}: no anchors in the last '
                      f'{self.report_interval} iterations', logger='current')
        else:
            print_log(self._line(name, health), logger='current')
        if is_main_process():
            self._warn(name, watch, health)

    def _line(self, name: str, health: Health) -> str:
        line = (f'contrast of {name}: positive cosine {health.positive:.3f}, '
                f'negative {health.negative:.3f}, nearest '
                f'{health.nearest:.3f}, margin {health.margin:.3f}')
        if not health.margins.isnan().all():
            lowest = int(health.margins.nan_to_num(nan=torch.inf).argmin())
            line += (f' (lowest {self.classes[lowest]} '
                     f'{health.margins[lowest]:.3f})')
        line += (f', spread {health.spread:.4f}, classes among anchors '
                 f'{int(health.seen.sum())}/{len(health.seen)}')
        if health.held is not None:
            line += f', in the bank {int(health.held.sum())}'
        scalars = health.scalars()
        if 'max_age' in scalars:
            line += (f', age at most {scalars["max_age"]:.0f}, mean '
                     f'{scalars["mean_age"]:.1f}')
        return line

    def _warn(self, name: str, watch: _Watch, health: Health) -> None:
        """Warn of what is new; forget what has recovered."""
        texts: dict[str, str] = {}
        watch.low = watch.low + 1 if health.margin < self.min_margin else 0
        if watch.low >= self.patience:
            texts['margin'] = (
                f'Contrast of {name!r} separates nothing: anchors have a '
                f'cosine of {health.positive:.3f} with their own class and '
                f'of {health.nearest:.3f} with the nearest other one '
                f'({self.patience} reports in a row), however the loss '
                f'falls. Try a smaller tau ({watch.head.tau:g} now; a large '
                'one makes the loss linear, which looks at all other classes '
                'alike), a larger loss_weight or a later start.')
        all_around = watch.head.channels**-0.5
        if health.spread < self.min_spread * all_around:
            texts['spread'] = (
                f'Embeddings of {name!r} have collapsed into one direction: '
                f'their spread is {health.spread:.2g}, that of directions '
                f'all around {all_around:.2g}. Try a smaller learning rate '
                'or loss_weight, or a projection without last_act.')
        if health.held is not None:
            texts.update(self._classes_lost(name, health))
        for key, text in texts.items():
            if key not in watch.warned:
                print_log(text, logger='current', level=logging.WARNING)
        watch.warned = set(texts)

    def _classes_lost(self, name: str, health: Health) -> dict[str, str]:
        """Classes that the bank lacks, and those that are old."""
        assert health.held is not None
        texts = {}
        missing = (health.seen & ~health.held).nonzero().flatten().tolist()
        for c in missing:
            texts[f'missing {c}'] = (
                f'Class {self.classes[c]!r} is among the anchors of '
                f'{name!r}, but not in its bank: such an anchor has no '
                'positive and no loss. Do the views that fill the bank have '
                "this class? PrototypeInitHook fills a bank before training.")
        if health.ages is not None:
            old = health.held & (health.ages > self.max_age)
            for c in old.nonzero().flatten().tolist():
                texts[f'age {c}'] = (
                    f'Class {self.classes[c]!r} in the bank of {name!r} has '
                    f'not been updated for {int(health.ages[c])} updates, '
                    'while the embeddings moved on. Try rare-class sampling '
                    'of the view that fills the bank (rare_class of its '
                    'stream).')
        return texts


def _anchors(head: ContrastHead) -> list[Anchors]:
    """Anchors and labels of the latest iteration, of all its losses."""
    last = head.last or ()
    sets = [last] if isinstance(last, dict) else last
    return [(one['anchors'], one['labels']) for one in sets]


def _own_centres(sums: Sums, known: Sequence[Anchors]
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the anchors by class over ranks; who is there, who is alone."""
    number = torch.zeros_like(sums.seen)
    centres = sums.first.new_zeros(len(number), len(sums.first))
    for vectors, labels in known:
        number.index_add_(0, labels, torch.ones_like(
            labels, dtype=torch.float64))
        centres.index_add_(0, labels, vectors.double())
    packed = torch.cat([number.unsqueeze(1), centres], 1)
    all_reduce(packed)
    return packed[:, 1:], packed[:, 0] > 0, packed[:, 0] == 1


def _memory(head: ContrastHead) -> tuple[Tensor | None, Tensor | None]:
    """Classes that the bank holds, and their ages, on the host."""
    memory = bank_centres(head)
    if memory is None:
        return None, None
    ages = head.bank.age.cpu() if head.bank.remembers else None
    return memory[1].cpu(), ages
