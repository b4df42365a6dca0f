"""Watches which classes the pseudo-labels hold."""

from __future__ import annotations

import logging

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from ...adaptation.step import Step
from .uda_visualization import class_colors, uda_model

# Rows of the sums: pixels of all pseudo-labels, of those that count, sum of
# confidences, pixels of source labels.
_ALL, _USED, _CONFIDENCE, _SOURCE = range(4)


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half the L1 distance between two histograms, each scaled to sum 1.

    Args:
        first (Tensor): Counts, ``(C,)``.
        second (Tensor): Counts, ``(C,)``.

    Returns:
        Tensor: 0-d, in [0, 1]; nan if a histogram is empty.
    """
    return 0.5 * (first / first.sum() - second / second.sum()).abs().sum()


@HOOKS.register_module()
class PseudoLabelHealthHook(Hook):
    """Compares pseudo-labels with source labels, and warns of lost classes.

    Self-training may stop to predict a rare class for ever. Every
    ``interval`` iterations the visualizer gets, for each class, its share of
    the pseudo-labels that count (weight > 0) and of the source labels and its
    mean confidence, as ``health/...``; the log gets the total variation
    between the two histograms, and at every report one line with all classes.
    Sums stay on the device in between. They restart when a run is resumed.

    Args:
        interval (int): Iterations between scalars.
        report_interval (int): Iterations between reports, a multiple of
            ``interval``.
        source (str): Labelled view to compare with; without it a class is
            compared with its own past only.
        pseudo_label (str): Name in ``model.pseudo_labels``.
        vanish_ratio (float): A class is low when its share falls below this
            part of its own running share or of its share in the source.
        patience (int): Reports in a row for which a class must be low to be
            warned of, once until it recovers.
        momentum (float): Of the running share, per report.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 interval: int = 50,
                 report_interval: int = 200,
                 source: str = 'source',
                 pseudo_label: str = 'target',
                 vanish_ratio: float = 0.01,
                 patience: int = 3,
                 momentum: float = 0.9) -> None:
        where = 'in custom_hooks'
        if interval < 1 or report_interval < 1 or report_interval % interval:
            raise ValueError(
                f'PseudoLabelHealthHook.report_interval {where} must be a '
                f'multiple of interval, got {report_interval} and {interval}.')
        if not 0 < vanish_ratio < 1:
            raise ValueError(f'PseudoLabelHealthHook.vanish_ratio {where} '
                             f'must lie in (0, 1), got {vanish_ratio}.')
        if patience < 1:
            raise ValueError(f'PseudoLabelHealthHook.patience {where} must '
                             f'be >= 1, got {patience}.')
        if not 0 <= momentum < 1:
            raise ValueError(f'PseudoLabelHealthHook.momentum {where} must '
                             f'lie in [0, 1), got {momentum}.')
        self.interval = interval
        self.report_interval = report_interval
        self.source = source
        self.pseudo_label = pseudo_label
        self.vanish_ratio = vanish_ratio
        self.patience = patience
        self.momentum = momentum

    def before_train(self, runner: Runner) -> None:
        """Check the model, and start to count.

        Raises:
            ValueError: If the model has no such pseudo-labels.
        """
        model = uda_model(runner, 'PseudoLabelHealthHook')
        if self.pseudo_label not in model.pseudo_labels:
            raise ValueError(
                f'PseudoLabelHealthHook.pseudo_label = {self.pseudo_label!r} '
                'in custom_hooks is not in model.pseudo_labels, which has '
                f'{sorted(model.pseudo_labels)}.')
        self.classes, _ = class_colors(runner, model.num_classes)
        count = len(self.classes)
        self._sums: Tensor | None = None  # of this interval, on the device
        self._report = torch.zeros(4, count, dtype=torch.float64)
        self._seen = torch.zeros(count, dtype=torch.float64)  # source pixels
        self._running: Tensor | None = None
        self._low = torch.zeros(count, dtype=torch.long)
        self._warned = torch.zeros(count, dtype=torch.bool)

    # See UDAVisualizationHook for how hooks share the step.

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Ask for the step of every iteration."""
        model = uda_model(runner, 'PseudoLabelHealthHook')
        model.last_step = None
        model.keep_step = True

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Count, and report at the end of an interval."""
        step = uda_model(runner, 'PseudoLabelHealthHook').last_step
        if step is not None:
            self._count(step)
        number = runner.iter + 1
        if number % self.interval == 0:
            self._flush(runner, number)
        if number % self.report_interval == 0:
            self._tell()

    def _count(self, step: Step) -> None:
        """Add one iteration to the sums, without waiting for the device."""
        pseudo = step.pseudo_labels.get(self.pseudo_label)
        if pseudo is not None:
            self._add(_ALL, pseudo.labels, None)
            self._add(_USED, pseudo.labels, pseudo.weights > 0)
            self._add(_CONFIDENCE, pseudo.labels, pseudo.confidence)
        source = step.views.get(self.source)
        if source is not None and source.labels is not None:
            self._add(_SOURCE, source.labels, None)

    def _add(self, row: int, labels: Tensor, values: Tensor | None) -> None:
        count = len(self.classes)
        if self._sums is None:
            # one more bin takes the ignored pixels: picking the others out
            # (or bincount) would wait for the device
            self._sums = torch.zeros(4, count + 1, dtype=torch.float64,
                                     device=labels.device)
        index = torch.where((labels >= 0) & (labels < count), labels, count)
        if values is None:
            values = torch.ones_like(labels)
        self._sums[row].scatter_add_(
            0, index.flatten(), values.flatten().to(torch.float64))

    def _flush(self, runner: Runner, number: int) -> None:
        """Write the scalars of an interval."""
        count = len(self.classes)
        if self._sums is None:  # every rank takes part in the sum below
            self._sums = torch.zeros(
                4, count + 1, dtype=torch.float64,
                device=next(runner.model.parameters()).device)
        all_reduce(self._sums)
        sums = self._sums[:, :count].cpu()
        self._sums = None
        self._report += sums
        self._seen += sums[_SOURCE]
        scalars = {}
        for title, values in (
                ('share', sums[_USED] / sums[_USED].sum()),
                ('source_share', sums[_SOURCE] / sums[_SOURCE].sum()),
                ('confidence', sums[_CONFIDENCE] / sums[_ALL])):
            for name, value in zip(
                    self.classes, values.tolist(), strict=True):
                if value == value:  # 0 / 0 says nothing
                    scalars[f'health/{_tag(name)}_{title}'] = value
        distance = float(total_variation(sums[_USED], sums[_SOURCE]))
        if distance == distance:
            scalars['health/total_variation'] = distance
            # the one number of all that goes into mmengine's own log lines
            runner.message_hub.update_scalar(
                'train/health.total_variation', distance)
        if scalars:
            runner.visualizer.add_scalars(scalars, step=number)

    def _tell(self) -> None:
        """Log one line with all classes, and warn of lost ones."""
        sums, self._report = self._report, torch.zeros_like(self._report)
        used = sums[_USED]
        if used.sum() == 0:
            print_log('pseudo-labels: none counted in the last '
                      f'{self.report_interval} iterations', logger='current')
            return
        share = used / used.sum()
        source = sums[_SOURCE] / sums[_SOURCE].sum()
        confidence = sums[_CONFIDENCE] / sums[_ALL]
        parts = []
        for c, name in enumerate(self.classes):
            part = f'{name} {_percent(share[c])}/{_percent(source[c])}'
            if confidence[c] == confidence[c]:
                part += f' ({confidence[c]:.2f})'
            parts.append(part)
        print_log('pseudo-labels, % of pixels/% in source (confidence): '
                  + ', '.join(parts), logger='current')
        self._judge(share)

    def _judge(self, share: Tensor) -> None:
        """Warn of classes that are low for the last time allowed."""
        running = share if self._running is None else self._running
        source = self._seen / self._seen.sum().clamp_min(1)
        has_source = bool(self._seen.sum() > 0)
        usual = torch.maximum(running, source)
        low = share < self.vanish_ratio * usual
        if has_source:  # a class that the source lacks can't be learned
            low &= self._seen > 0
        self._low = torch.where(low, self._low + 1, 0)
        lost = (self._low >= self.patience) & ~self._warned
        for c in lost.nonzero().flatten().tolist():
            self._warn(self.classes[c], float(share[c]), float(running[c]),
                       float(source[c]) if has_source else None)
        self._warned = (self._warned | lost) & low
        # a low share must not become the usual one
        followed = self.momentum * running + (1 - self.momentum) * share
        self._running = torch.where(low, running, followed)

    def _warn(self, name: str, share: float, before: float,
              source: float | None) -> None:
        if not is_main_process():
            return
        text = (f'Class {name!r} has vanished from the pseudo-labels: '
                f'{share:.3%} of their pixels, {before:.3%} before')
        if source is not None:
            text += f', {source:.3%} in the source'
        text += (
            f' ({self.patience} reports in a row). If the target has this '
            'class, try rare-class sampling of the source (train_dataloader.'
            f'dataset.streams.{self.source}.rare_class), a slower teacher '
            '(model.teachers.*.alpha) or a later learning-rate peak '
            '(param_scheduler).')
        print_log(text, logger='current', level=logging.WARNING)


def _percent(share: Tensor) -> str:
    return f'{100 * float(share):.2f}' if share == share else '-'


def _tag(name: str) -> str:
    """A class name as one part of a tag."""
    return '_'.join(str(name).replace('/', ' ').split())
