"""Which pixels of a batch are anchors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    check_choice,
    draw_per_group,
    entropy_threshold,
    hard_and_easy,
    known_labels,
    own_probability,
    pixel_entropy,
    send,
)


@dataclass
class Anchors:
    """Pixels that were chosen; some slots may be empty.

    Args:
        index (Tensor): Into the flattened pixels ``B * h * w``, int64,
            ``(A,)``; 0 in an empty slot.
        labels (Tensor): int64, ``(A,)``; ignored in an empty slot.
    """

    index: Tensor
    labels: Tensor


class Sampler(nn.Module):
    """Chooses anchors among the pixels of a batch.

    Numbers of slots depend on shapes alone. What is random is in
    :meth:`draw`; nothing waits for the device.
    """

    #: Whether :meth:`forward` reads the student's logits.
    needs_logits = False
    #: Whether anchors are all pixels in their order, so none is looked up.
    takes_all = False

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One uniform number in [0, 1) for each pixel.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            generator (torch.Generator): CPU generator.

        Returns:
            Tensor: float32, ``(B * h * w,)``, on the labels' device.
        """
        return send(torch.rand(labels.numel(), generator=generator),
                    labels.device)

    def forward(self,
                labels: Tensor,
                scores: Tensor,
                logits: Tensor | None,
                num_classes: int,
                ignore_index: int = 255) -> Anchors:
        """Choose anchors.

        Args:
            labels (Tensor): int64, ``(B, h, w)``; ids outside ``[0, C)`` are
                ignored.
            scores (Tensor): What :meth:`draw` gave.
            logits (Tensor, optional): The student's, ``(B, C, h, w)``; read
                if :attr:`needs_logits`.
            num_classes (int): Number of classes C.
            ignore_index (int): Label that is ignored.

        Returns:
            Anchors: The pixels with the highest scores.

        Raises:
            ValueError: If logits are needed and none are given, or of
                another shape.
        """
        raise NotImplementedError

    def set_progress(self, progress: float) -> None:
        """Follow a schedule; here none.

        Args:
            progress (float): Share of the training that is done, in [0, 1].
        """

    def check_positive(self, **sizes: int) -> None:
        """Refuse sizes below 1.

        Args:
            sizes (int): By the name of the argument.

        Raises:
            ValueError: Naming sampler, argument and value.
        """
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f'{type(self).__name__}.{name} must be at '
                                 f'least 1, got {size}')

    def check_range(self, name: str, value: float, top: float) -> None:
        """Refuse a value that is not in ``[0, top]``.

        Args:
            name (str): The argument.
            value (float): Its value.
            top (float): The largest one.

        Raises:
            ValueError: Naming sampler, argument and value.
        """
        if not 0 <= value <= top:
            raise ValueError(f'{type(self).__name__}.{name} must be in '
                             f'[0, {top:g}], got {value}')

    def logits_of(self, labels: Tensor, logits: Tensor | None) -> Tensor:
        """The logits, which must be there and fit the labels.

        Args:
            labels (Tensor): ``(B, h, w)``.
            logits (Tensor, optional): ``(B, C, h, w)``.

        Raises:
            ValueError: If there are none, or of another shape.
        """
        if logits is None:
            raise ValueError(f'{type(self).__name__} needs the logits of the '
                             'student')
        if (logits.shape[0], *logits.shape[2:]) != tuple(labels.shape):
            raise ValueError(
                f'{type(self).__name__} needs logits of the labels\' size, '
                f'{tuple(labels.shape)}, got {tuple(logits.shape)}')
        return logits


@MODELS.register_module()
class AllPixels(Sampler):
    """All pixels are anchors; slots of ignored ones are empty."""

    takes_all = True

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Nothing.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            generator (torch.Generator): Not used.

        Returns:
            Tensor: Empty.
        """
        return torch.empty(0, device=labels.device)

    def forward(self,
                labels: Tensor,
                scores: Tensor,
                logits: Tensor | None,
                num_classes: int,
                ignore_index: int = 255) -> Anchors:
        """See :meth:`Sampler.forward`.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            scores (Tensor): Not used.
            logits (Tensor, optional): Not used.
            num_classes (int): Number of classes C.
            ignore_index (int): Label that is ignored.

        Returns:
            Anchors: ``B * h * w`` slots, in order.
        """
        known = known_labels(labels, num_classes, ignore_index)
        return Anchors(
            torch.arange(labels.numel(), device=labels.device),
            labels.where(known, labels.new_full((), ignore_index)).flatten())


@MODELS.register_module()
class PerClassRandom(Sampler):
    """Some pixels of each class, drawn uniformly without replacement.

    Args:
        number (int): Pixels of each class, at most; all if there are less.
        scope (str): Of each class of the 'batch', or of each 'image'.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, number: int = 256, scope: str = 'batch') -> None:
        super().__init__()
        self.check_positive(number=number)
        check_choice(f'{type(self).__name__}.scope', scope,
                     ('batch', 'image'))
        self.number = number
        self.scope = scope

    def candidates(self, labels: Tensor, logits: Tensor | None,
                   ignore_index: int) -> Tensor | None:
        """Which pixels may be drawn, among those with a label.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            logits (Tensor, optional): ``(B, C, h, w)``.
            ignore_index (int): Label that is ignored.

        Returns:
            Tensor, optional: bool, ``(B, h, w)``. None: all, as here.
        """
        return None

    @torch.no_grad()
    def forward(self,
                labels: Tensor,
                scores: Tensor,
                logits: Tensor | None,
                num_classes: int,
                ignore_index: int = 255) -> Anchors:
        """See :meth:`Sampler.forward`.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            scores (Tensor): ``(B * h * w,)``.
            logits (Tensor, optional): ``(B, C, h, w)``.
            num_classes (int): Number of classes C.
            ignore_index (int): Label that is ignored.

        Returns:
            Anchors: ``C * number`` slots, class by class; ``B`` times as
            many with ``scope='image'``, image by image.
        """
        known = known_labels(labels, num_classes, ignore_index)
        allowed = self.candidates(labels, logits, ignore_index)
        if allowed is not None:
            known = known & allowed
        sets = len(labels) if self.scope == 'image' else 1
        groups = labels
        if self.scope == 'image':
            groups = labels + num_classes * torch.arange(
                sets, device=labels.device).view(-1, 1, 1)
        groups = groups.where(known, labels.new_full((), sets * num_classes))
        index, filled = draw_per_group(
            groups.flatten(), scores, sets * num_classes, self.number)
        mine = torch.arange(num_classes, device=labels.device).repeat(sets)
        return Anchors(index.flatten(), mine.unsqueeze(1).where(
            filled, labels.new_full((), ignore_index)).flatten())


@MODELS.register_module()
class Uncertain(PerClassRandom):
    """ReCo's queries: pixels whose class is not very probable.

    Liu et al., ICLR 2022, who draw with replacement.

    Args:
        number (int): Pixels of each class, at most.
        max_probability (float): The probability of a pixel's class must be
            below it, in [0, 1].
        scope (str): See :class:`PerClassRandom`.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_logits = True

    def __init__(self,
                 number: int = 256,
                 max_probability: float = 0.97,
                 scope: str = 'batch') -> None:
        super().__init__(number, scope)
        self.check_range('max_probability', max_probability, 1)
        self.max_probability = max_probability

    def candidates(self, labels: Tensor, logits: Tensor | None,
                   ignore_index: int) -> Tensor:
        """See :meth:`PerClassRandom.candidates`.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            logits (Tensor, optional): ``(B, C, h, w)``; must be given.
            ignore_index (int): Label that is ignored.

        Raises:
            ValueError: If logits are missing or of another shape.
        """
        return own_probability(self.logits_of(labels, logits), labels,
                               ignore_index) < self.max_probability


@MODELS.register_module()
class LowEntropy(PerClassRandom):
    """U2PL's queries: reliable pixels whose class is probable.

    Wang et al., CVPR 2022, who draw with replacement. Pixels of all ranks
    together say what a low entropy is, so all must draw, with label maps of
    one size.

    Args:
        number (int): Pixels of each class, at most.
        min_probability (float): The probability of a pixel's class must be
            above it, in [0, 1].
        percent (float): A pixel's entropy must not be above this percentile
            of those of all labelled pixels; at the start of training, in
            [0, 100]. With 100 all are reliable, as ground truth is.
        anneal (bool): Let the percentile fall to 0 in the course of
            training, see :meth:`set_progress`.
        scope (str): See :class:`PerClassRandom`.

    Raises:
        ValueError: If an argument is out of range.
    """

    needs_logits = True

    def __init__(self,
                 number: int = 256,
                 min_probability: float = 0.3,
                 percent: float = 20.,
                 anneal: bool = True,
                 scope: str = 'batch') -> None:
        super().__init__(number, scope)
        self.check_range('min_probability', min_probability, 1)
        self.check_range('percent', percent, 100)
        self.min_probability = min_probability
        self.first_percent = self.percent = percent
        self.anneal = anneal

    def set_progress(self, progress: float) -> None:
        """Set ``percent`` to its first value times ``1 - progress``.

        Args:
            progress (float): Share of the training that is done, in [0, 1].
        """
        if self.anneal:
            self.percent = self.first_percent * (1 - progress)

    def candidates(self, labels: Tensor, logits: Tensor | None,
                   ignore_index: int) -> Tensor:
        """See :meth:`PerClassRandom.candidates`.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            logits (Tensor, optional): ``(B, C, h, w)``; must be given.
            ignore_index (int): Label that is ignored.

        Raises:
            ValueError: If logits are missing or of another shape.
        """
        logits = self.logits_of(labels, logits)
        known = known_labels(labels, logits.shape[1], ignore_index)
        entropy = pixel_entropy(logits)
        reliable = entropy <= entropy_threshold(entropy, known, self.percent)
        return reliable & (own_probability(logits, labels, ignore_index)
                           > self.min_probability)


@MODELS.register_module()
class HardEasy(Sampler):
    """ContrastiveSeg's anchors: half wrongly, half rightly predicted pixels.

    Wang et al., ICCV 2021, see :func:`mmseg_contrast.ops.hard_and_easy`.

    Args:
        max_samples (int): Number of slots.
        max_views (int): Anchors of a class in an image, at most; classes
            with no more pixels than that have none.

    Raises:
        ValueError: If an argument is below 1.
    """

    needs_logits = True

    def __init__(self, max_samples: int = 1024, max_views: int = 100) -> None:
        super().__init__()
        self.check_positive(max_samples=max_samples, max_views=max_views)
        self.max_samples = max_samples
        self.max_views = max_views

    @torch.no_grad()
    def forward(self,
                labels: Tensor,
                scores: Tensor,
                logits: Tensor | None,
                num_classes: int,
                ignore_index: int = 255) -> Anchors:
        """See :meth:`Sampler.forward`.

        Args:
            labels (Tensor): int64, ``(B, h, w)``.
            scores (Tensor): ``(B * h * w,)``.
            logits (Tensor, optional): ``(B, C, h, w)``; must be given.
            num_classes (int): Number of classes C.
            ignore_index (int): Label that is ignored.

        Returns:
            Anchors: ``max_samples`` slots, the empty ones at the end; by
            image, class, hard ones and easy ones.

        Raises:
            ValueError: If logits are missing or of another shape.
        """
        # Not argmax, which is slower on a CPU.
        predicted = self.logits_of(labels, logits).max(1).indices
        return Anchors(*hard_and_easy(
            labels, predicted, scores, num_classes, self.max_samples,
            self.max_views, ignore_index))
