"""The lazily evaluated state of one iteration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import forked_rng, generator_at
from .pseudo_labels import PseudoLabels
from .students import Features, StudentOutput
from .view import View

if TYPE_CHECKING:
    from .segmentor import UDASegmentor


class Step:
    """Views, predictions and pseudo-labels of one iteration.

    Each is computed when first asked for, and once.

    Args:
        model (UDASegmentor): The model.
        streams (dict[str, View]): What the loader delivered.
        iteration (int): Steps before this one.
        progress (float): Share of training done, in [0, 1].
        seed (int): Seed of the run.
        rank (int): This process.
    """

    def __init__(self, model: UDASegmentor, streams: dict[str, View],
                 iteration: int, progress: float, seed: int,
                 rank: int) -> None:
        self._model = model
        self.iteration = iteration
        self.progress = progress
        self.seed = seed
        self.rank = rank
        self.views: dict[str, View] = dict(streams)
        self.students: dict[str, StudentOutput] = {}
        self.passes: dict[tuple[str, str], StudentOutput] = {}
        self.predictions: dict[tuple[str, str], Tensor] = {}
        self.pseudo_labels: dict[str, PseudoLabels] = {}
        self.logs: dict[str, Tensor] = {}
        self._joining = False

    def _position(self, *name: str) -> tuple[int | str, ...]:
        return self.seed, self.rank, self.iteration, *name

    def generator(self, name: str) -> torch.Generator:
        """A generator for the draws of one part in this iteration."""
        return generator_at(*self._position(name))

    def view(self, name: str) -> View:
        """A view by name; streams are views."""
        if name not in self.views:
            # A module's own name travels with it: its draws depend on it.
            self.views[name] = self._model.views[name](self, name)
        return self.views[name]

    def student(self, view: str) -> StudentOutput:
        """The student's pass over a view, in training mode."""
        if view not in self.students:
            if view in self._model.joint_views:
                self._join(self._model.joint_views)
            else:
                self._see(view)
        return self.students[view]

    def _see(self, view: str, features: Features | None = None) -> None:
        self.students[view] = StudentOutput(
            self._model.adapter, self.view(view),
            self._position('student', view), view in self._model.norm_views,
            features=features)

    def _join(self, names: tuple[str, ...]) -> None:
        """One pass of the backbone over several views."""
        if self._joining:
            raise ValueError(
                f'model.joint_views = {list(names)}: one of these is '
                "labelled by the student's pass over another, so that they "
                'cannot be seen together: leave it out.')
        self._joining = True
        views = [self.view(name) for name in names]
        with forked_rng(views[0].images.device,
                        *self._position('student', *names, 'features')):
            each = self._model.adapter.joint_features(views)
        for name, features in zip(names, each, strict=True):
            self._see(name, features)
        self._joining = False

    def teacher(self, name: str, view: str) -> Tensor:
        """A teacher's class probabilities for a view, ``(N, C, H, W)``."""
        key = (name, view)
        if key not in self.predictions:
            seen = self.view(view)
            # Some heads draw random bases even in evaluation mode.
            with forked_rng(seen.images.device,
                            *self._position('teacher', name, view)):
                self.predictions[key] = self._model.teachers[name].predict(
                    seen, self.passes.get(key))
        return self.predictions[key]

    def teacher_pass(self, name: str, view: str) -> StudentOutput:
        """A teacher's features, decoder features and embeddings of a view.

        Without gradients.
        """
        key = (name, view)
        if key not in self.passes:
            self.passes[key] = self._model.teachers[name].see(
                self.view(view), self._position('teacher', name, view))
        return self.passes[key]

    def pseudo_label(self, name: str) -> PseudoLabels:
        """Pseudo-labels by the policy's name."""
        if name not in self.pseudo_labels:
            self.pseudo_labels[name] = self._model.pseudo_labels[name](
                self, name)
        return self.pseudo_labels[name]

    @property
    def states(self) -> nn.ModuleDict:
        """What several parts share, by name (``model.state``)."""
        return self._model.state

    def log(self, key: str, value: Tensor) -> None:
        """Show a 0-d tensor in the log; it is no part of the objective.

        Raises:
            ValueError: If the key holds 'loss': mmengine would minimise it.
        """
        if 'loss' in key:
            raise ValueError(
                f"log key {key!r} holds 'loss', so it would be optimised.")
        self.logs[key] = value.detach()
