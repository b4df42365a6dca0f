"""One real step, to be run again piece by piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmseg_contrast.adaptation import Step
from mmseg_contrast.adaptation.heads import Target
from mmseg_contrast.adaptation.students import StudentOutput

from .cut import Known, cut
from .training import Training


@dataclass(frozen=True)
class Pass:
    """What any code with this method must compute.

    Args:
        forward (Callable): Gives what is backpropagated, or None.
        context (Callable): Of the forward, as in a step: mixed precision.
    """

    forward: Callable[[], Tensor | None]
    context: Callable[[], Any]

    def __call__(self) -> None:
        """Forward and backward."""
        with self.context():
            result = self.forward()
        if result is not None:
            result.backward()

    def flops(self) -> int:
        """Of the forward; a multiply-add counts as two."""
        with FlopCounterMode(display=False) as counter, self.context():
            self.forward()
        return counter.get_total_flops()


@dataclass(frozen=True)
class Part:
    """What our step does besides.

    Args:
        run (Callable): Does it.
        beyond (Callable, optional): A piece of it that belongs to a pass,
            whose time is taken off.
    """

    run: Callable[[], None]
    beyond: Callable[[], None] | None = None


class Pieces:
    """Passes of a step, and the parts of the rest.

    Which there are is what one real step asked for: the views that student
    and teachers saw, and what they were asked about them. A piece runs the
    step's own code, on a step that knows all the rest already, with student
    and teachers cut off from their graphs.

    Args:
        training (Training): That steps.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.model = training.model
        self.model.keep_step = True
        training.losses()
        step = self.model.last_step
        assert step is not None
        self.model.keep_step = False
        self.model.last_step = None
        known: Known = {}
        self.students = {view: _cut_output(one, known)
                         for view, one in step.students.items()}
        self.seen = {key: _cut_output(one, known)
                     for key, one in step.passes.items()}
        self.leaves = [leaf for _, leaf in known.values()
                       if leaf.requires_grad]
        step.students, step.passes = {}, {}
        self.kept = step
        # Views that an objective has the segmentation loss of.
        self.learnt = {name: self._learnt(name)
                       for name in self.model.objectives}
        self.gradients = [torch.full_like(one, 1e-3)
                          for one in training.parameters]

    def again(self, **changes: Any) -> Step:
        """The kept step, all of which is known but what is changed."""
        step = copy.copy(self.kept)
        known = dict(
            views=dict(step.views), pseudo_labels=dict(step.pseudo_labels),
            predictions=dict(step.predictions), logs={},
            students={view: _without_embeddings(one)
                      for view, one in self.students.items()},
            passes={key: _without_embeddings(one)
                    for key, one in self.seen.items()})
        for name, value in (known | changes).items():
            setattr(step, name, value)
        return step

    def prepare(self) -> None:
        """No gradients, as before a step, and the draws of the last one."""
        self.kept.iteration = self.model.clock.now() - 1
        for leaf in self.leaves:
            leaf.grad = None
        self.training.optim_wrapper.zero_grad()

    def _context(self) -> Any:
        return self.training.optim_wrapper.optim_context(self.model)

    def _learnt(self, name: str) -> list[str]:
        """Views on which an objective asks for the segmentation loss."""
        step, found = self.again(), []
        original = StudentOutput.losses

        def losses(output: StudentOutput, target: Target
                   ) -> dict[str, Tensor]:
            found.extend(view for view, one in step.students.items()
                         if one is output)
            return original(output, target)

        with mock.patch.object(StudentOutput, 'losses', losses), (
                self._context()):
            self.model.objectives[name](step)
        return found

    # ---------------------------------------------------------------- passes

    def passes(self) -> dict[str, Pass]:
        """By name, what any code with this method must compute."""
        found: dict[str, Callable[[], Tensor | None]] = {}
        for view in self.students:
            found[f'student {view}'] = self._student(view)
        for key in {**self.seen, **self.kept.predictions}:
            found[f'teacher {" ".join(key)}'] = self._teacher(*key)
        for name, objective in self.model.objectives.items():
            if _encoder(objective) is not None:
                found[f'frozen backbone {name}'] = self._frozen(objective)
        return {name: Pass(forward, self._context)
                for name, forward in found.items()}

    def _student(self, view: str) -> Callable[[], Tensor]:
        learns = any(view in views for views in self.learnt.values())
        decodes = bool(self.students[view]._outputs)

        def forward() -> Tensor:
            # By itself, also where the step sees several views at once.
            step = self.again(students={})
            step._see(view)
            output = step.students[view]
            if learns:
                return self._stock_loss(output, view)
            if decodes and output.logits is not None:
                return output.logits.float().sum()
            return torch.stack(
                [stage.float().sum() for stage in output.features]).sum()

        return forward

    def _stock_loss(self, output: StudentOutput, view: str) -> Tensor:
        """As without weights."""
        seen = self.kept.views[view]
        losses = output.losses(Target(
            seen.labels, edges=seen.extras.get('edges')))
        return torch.stack(list(losses.values())).sum()

    def _teacher(self, name: str, view: str) -> Callable[[], None]:
        key = name, view
        predicts = key in self.kept.predictions

        def forward() -> None:
            step = self.again(passes={}, predictions={})
            if key in self.seen:
                output = step.teacher_pass(name, view)
                # Decoding once is enough.
                if self.seen[key]._outputs and not predicts:
                    output.logits  # noqa: B018  computed when asked for
            if predicts:
                step.teacher(name, view)

        return forward

    def _frozen(self, objective: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def forward() -> None:
            view = self.kept.views[objective.view]
            _encoder(objective)(
                self.model.adapter.backbone_images(view), **view.inputs)

        return forward

    # ----------------------------------------------------------------- parts

    def parts(self) -> dict[str, Part]:
        """By name, what our step does besides."""
        model, step = self.model, self.kept
        batch = self.training.batch
        found = dict(preprocessor=Part(
            lambda: model.data_preprocessor(batch, True)))
        for name, teacher in model.teachers.items():
            if hasattr(teacher, 'update'):
                found[f'update of teacher {name}'] = Part(
                    lambda teacher=teacher: teacher.update(model.segmentor))
        for name in step.pseudo_labels:
            found[_titled('pseudo-labels', name, model.pseudo_labels)] = Part(
                lambda name=name: self.again(pseudo_labels=_without(
                    step.pseudo_labels, name)).pseudo_label(name))
        for name in step.views:
            if name in model.views:
                found[_titled('view', name, model.views)] = Part(
                    lambda name=name: self.again(views=_without(
                        step.views, name)).view(name))
        for name in model.order:
            found[_titled('objective', name, model.objectives)] = (
                self._objective(name))
        for name, state in model.state.items():
            found[_titled('state', name, model.state)] = Part(
                lambda state=state: state.update(self.again()))
        found['optimizer'] = Part(self._optimize)
        return {name: Part(self._in_context(part.run), part.beyond)
                if name != 'optimizer' else part
                for name, part in found.items()}

    def _in_context(self, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with self._context():
                function()

        return run

    def _objective(self, name: str) -> Part:
        """What it computes from what student and teachers gave."""
        objective, views = self.model.objectives[name], self.learnt[name]
        stages = None
        if _encoder(objective) is not None:
            view = self.kept.views[objective.view]
            with torch.no_grad(), self._context():
                stages = _encoder(objective)(
                    self.model.adapter.backbone_images(view), **view.inputs)

        def run() -> None:
            with _answering(objective, stages), self._context():
                losses = objective(self.again())
            _backward([value for key, value in losses.items()
                       if 'loss' in key])

        def stock() -> None:
            with self._context():
                students = self.again().students
                losses = [self._stock_loss(students[view], view)
                          for view in views]
            _backward(losses)

        return Part(run, stock if views else None)

    def _optimize(self) -> None:
        """With clipping; it leaves no gradients."""
        for one, gradient in zip(
                self.training.parameters, self.gradients, strict=True):
            one.grad = gradient
        self.training.optim_wrapper.step()
        self.training.optim_wrapper.zero_grad()


def _cut_output(output: StudentOutput, known: Known) -> StudentOutput:
    """What backbone and heads gave, as leaves."""
    result = copy.copy(output)
    for name in ('backbone_features', 'features', '_outputs', '_seen'):
        setattr(result, name, cut(getattr(output, name), known=known))
    return result


def _without_embeddings(output: StudentOutput) -> StudentOutput:
    """A copy that projects anew, and that may be asked for more."""
    result = copy.copy(output)
    result._embeddings = {}
    result._outputs = dict(output._outputs)
    return result


def _without(known: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in known.items() if key != name}


def _titled(group: str, name: str, modules: nn.ModuleDict) -> str:
    return f'{group} {name} ({type(modules[name]).__name__})'


def _encoder(objective: nn.Module) -> nn.Module | None:
    """The frozen backbone of an objective that has one."""
    return getattr(objective, 'encoder', None)


@contextmanager
def _answering(objective: nn.Module, stages: Any) -> Iterator[None]:
    """The frozen backbone gives at once what it gave before."""
    if _encoder(objective) is None:
        yield
        return
    with mock.patch.object(
            objective, '_encoder', [lambda *args, **inputs: stages]):
        yield


def _backward(losses: list[Tensor]) -> None:
    losses = [one for one in losses if one.requires_grad]
    if losses:
        torch.stack([one.float() for one in losses]).sum().backward()
