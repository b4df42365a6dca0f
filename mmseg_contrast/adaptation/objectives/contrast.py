"""Contrast of pixels of some views with what a bank learnt from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...contrast import BatchBank
from ...models import Pixels
from ...ops import send
from ..students import contrast_heads

if TYPE_CHECKING:
    from ..step import Step

#: What is known of views in one iteration, by name and whose embeddings.
Seen = dict[tuple[str, str], Pixels]


@MODELS.register_module()
class Contrast(nn.Module):
    """The loss of a ContrastHead, which views it is on and who fills its bank.

    ======================  ================  =============================
    SPCL, SDCA              source, target    bank: the student's source
    SePiCo                  source, target    bank: the teacher's source
    ProCA                   source, target    bank: the student's, of both
    ContrastiveSeg, PiPa    source            bank: the student's source
    ======================  ================  =============================

    Labels of a view are its own, or, where it has none, those of a
    pseudo-label policy. Pixels that these leave out (margins) and, of
    pseudo-labels, those below ``min_confidence`` are ignored. Each view has a
    loss of its own, the mean over its anchors; the losses are added up.
    The head says temperature, weight and schedule.

    Args:
        student (nn.Module): The segmentor.
        head (str): Which of its ContrastHeads: 'aux', or 'aux_0', 'aux_1' of
            several auxiliary heads.
        anchors (Sequence[str]): Views with anchors.
        bank (Sequence[str]): Views that fill the bank, in this order.
        bank_from (str): Whose embeddings fill it, 'student' or 'teacher'.
        teacher (str): Name in ``model.teachers``, where one is asked.
        pseudo_labels (dict): For views without labels, the name of the
            policy in ``model.pseudo_labels``.
        min_confidence (float): In [0, 1].
        correct_only (Sequence[str]): Views of which only pixels count that
            the student has right.
        joint (bool): Whether the anchors of all views are one set, in which
            each is compared with all (BatchBank). They need one size.
        keys (str, optional): For a BatchBank: the view whose pixels are the
            keys. None: the anchors themselves.
        weighted (bool): Whether a pair counts by the weight of its anchor.
        shuffle (bool): A control: anchors get each other's labels, so the
            loss says nothing of classes.
        update_norm (bool): Whether the student's pass over these views
            records batch-norm statistics, besides the projection's own.

    Raises:
        ValueError: If an argument is out of range or there is no such head.
    """

    def __init__(self,
                 student: nn.Module,
                 head: str = 'aux',
                 anchors: Sequence[str] = ('source', 'target'),
                 bank: Sequence[str] = ('source', ),
                 bank_from: str = 'student',
                 teacher: str = 'ema',
                 pseudo_labels: Mapping[str, str] = dict(target='target'),
                 min_confidence: float = 0.,
                 correct_only: Sequence[str] = (),
                 joint: bool = False,
                 keys: str | None = None,
                 weighted: bool = False,
                 shuffle: bool = False,
                 update_norm: bool = False) -> None:
        super().__init__()
        where = 'model.objectives.*'
        found = contrast_heads(student)
        if head not in found:
            raise ValueError(
                f'{where}.head = {head!r} is no ContrastHead in '
                'model.segmentor.auxiliary_head, which has '
                f'{sorted(found) or "none"}.')
        if bank_from not in ('student', 'teacher'):
            raise ValueError(f"{where}.bank_from must be 'student' or "
                             f"'teacher', got {bank_from!r}.")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f'{where}.min_confidence must lie in [0, 1], '
                             f'got {min_confidence}.')
        for key, views in (('anchors', anchors), ('bank', bank),
                           ('correct_only', correct_only)):
            if isinstance(views, str):
                raise ValueError(f'{where}.{key} must be a list of views, '
                                 f'got {views!r}.')
        if not anchors:
            raise ValueError(f'{where}.anchors names no view.')
        if found[head].correct_only:
            raise ValueError(
                f"{where} claims a head with correct_only=True, which is for "
                "supervised training: name views in the objective's "
                'correct_only.')
        if keys is not None and not isinstance(found[head].bank, BatchBank):
            raise ValueError(
                f'{where}.keys = {keys!r} are for a head with a BatchBank, '
                f'{head!r} has a {type(found[head].bank).__name__}: leave '
                'them out, or name the view in bank.')
        self.head = head
        self.anchors = tuple(anchors)
        self.bank = tuple(bank)
        self.bank_from = bank_from
        self.teacher = teacher
        self.pseudo_labels = dict(pseudo_labels)
        self.min_confidence = min_confidence
        self.correct_only = tuple(correct_only)
        self.joint = joint
        self.keys = keys
        self.weighted = weighted
        self.shuffle = shuffle
        self.update_norm = update_norm
        self.needs = tuple(dict.fromkeys(
            [*anchors, *bank, *([keys] if keys else [])]))
        self.needs_pseudo_labels = tuple(
            policy for view, policy in self.pseudo_labels.items()
            if view in self.needs)
        self._head = [found[head]]  # a list: no second registration

    @property
    def contrast_head(self) -> nn.Module:
        """The head, which belongs to the student."""
        return self._head[0]

    @property
    def needs_teacher(self) -> str | None:
        """Name of the teacher that is asked for embeddings."""
        asked = (self.bank and self.bank_from == 'teacher'
                 or self._relates())
        return self.teacher if asked else None

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Update the bank and contrast, in the order that the head says.

        Args:
            step (Step): The iteration.

        Returns:
            dict[str, Tensor]: ``loss_<view>`` of each view with anchors, or
            ``loss_contrast`` of all together.

        Raises:
            ValueError: If a view has no labels, or sizes differ.
        """
        head = self.contrast_head
        head.last = None  # of the iteration before
        seen: Seen = {}
        if head.update == 'before':
            self._fill(step, seen)
        if step.iteration < head.start:
            losses = dict(loss_contrast=head.zero())
        else:
            losses = self._losses(step, seen)
        if head.update == 'after':
            self._fill(step, seen)
        return losses

    def _fill(self, step: Step, seen: Seen) -> None:
        for view in self.bank:
            self.contrast_head.update_bank(
                self._pixels(step, seen, view, self.bank_from),
                step.generator(f'contrast.{self.head}.bank.{view}'))

    def _losses(self, step: Step, seen: Seen) -> dict[str, Tensor]:
        head = self.contrast_head
        weight = head.weight_at(step.iteration)
        head.sampler.set_progress(step.progress)
        sets = {view: self._pixels(step, seen, view)
                for view in self.anchors}
        if self.joint:
            sets = dict(contrast=_together(sets, self.anchors))
        keys = None if self.keys is None else self._pixels(
            step, seen, self.keys)
        if self.shuffle:
            sets = {name: replace(pixels, labels=_shuffled(
                pixels.labels, step.generator(
                    f'contrast.{self.head}.shuffle.{name}')))
                for name, pixels in sets.items()}
        return {
            f'loss_{name}': weight * head.contrast(
                pixels, step.generator(f'contrast.{self.head}.{name}'), keys)
            for name, pixels in sets.items()}

    def _pixels(self, step: Step, seen: Seen, view: str,
                who: str = 'student') -> Pixels:
        """Embeddings of a view with its labels, once in an iteration."""
        if (view, who) not in seen:
            seen[view, who] = self._look(step, view, who)
        return seen[view, who]

    def _look(self, step: Step, name: str, who: str) -> Pixels:
        head = self.contrast_head
        view = step.view(name)
        labels, weights, parts = view.labels, view.weights, view.weight_parts
        if labels is None:
            if name not in self.pseudo_labels:
                raise ValueError(
                    f'Contrast on the view {name!r} needs labels, which it '
                    'has not: name a policy in the objective\'s '
                    f'pseudo_labels, such as dict({name}=\'target\').')
            pseudo = step.pseudo_label(self.pseudo_labels[name])
            labels, weights = pseudo.labels, pseudo.weights
            parts = pseudo.parts
            if self.min_confidence:
                labels = labels.where(
                    pseudo.confidence >= self.min_confidence,
                    head.ignore_index)
        if parts is not None:
            # By the masks: without a confident pixel the share q is 0, which
            # says nothing of a single pixel.
            counts = torch.stack([mask for _, mask in parts]).any(0)
            labels = labels.where(counts, head.ignore_index)
        elif weights is not None:
            labels = labels.where(weights > 0, head.ignore_index)
        correct_only = name in self.correct_only
        teacher = None
        if who == 'teacher':
            seen = step.teacher_pass(self.teacher, name)
        else:
            seen = step.student(name)
            if self._relates():
                teacher = step.teacher_pass(self.teacher, name).embed(
                    self.head)
        asks = correct_only or head.needs_logits and who == 'student'
        return head.pixels(
            seen.embed(self.head), labels, seen.logits if asks else None,
            correct_only, weights if self.weighted else None, teacher)

    def _relates(self) -> bool:
        """Whether the teacher says which pixels are related (ReKD)."""
        return getattr(self.contrast_head.bank, 'rule', None) == (
            'teacher_topk')


def _shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The same labels at other places."""
    order = torch.randperm(labels.numel(), generator=generator)
    return labels.flatten()[send(order, labels.device)].view_as(labels)


def _together(sets: Mapping[str, Pixels], views: Sequence[str]) -> Pixels:
    """Several batches as one."""
    shapes = {tuple(one.embeddings.shape[1:]) for one in sets.values()}
    if len(shapes) > 1:
        raise ValueError(
            f'Contrast(joint=True) on the views {list(views)} needs '
            f'embeddings of one size, got {sorted(shapes)}: give the streams '
            'the same crop size, or set joint=False.')

    def stacked(name: str) -> Tensor | None:
        maps = [getattr(one, name) for one in sets.values()]
        return None if any(one is None for one in maps) else torch.cat(maps)

    return Pixels(*(stacked(name) for name in (
        'embeddings', 'labels', 'logits', 'weights', 'teacher')))
