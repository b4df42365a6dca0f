"""Images whose detail is taken where the net is unsure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg.registry import MODELS
from torch import nn

from ...models import HRDASegmentor
from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class UnsureDetail(nn.Module):
    """The same view; HRDA's detail is not at a random place.

    CLUDA (Vayyat et al., 2022): of the windows that also the teacher has,
    that one where the student's prediction from the context has the highest
    mean entropy, for each image of the batch. On mixed images, with the
    published start::

        views=dict(
            mixed_strong=dict(
                _delete_=True, type='UnsureDetail', view='mixed_augmented',
                start=12001),
            mixed_augmented=dict(type='StrongAugment', view='mixed'))

    Context and detail then don't share a call of the backbone.

    Args:
        student (nn.Module): The segmentor.
        view (str): The view.
        start (int): Iterations before it begins, with the detail anywhere.

    Raises:
        ValueError: If an argument is out of range or the student has no
            detail.
    """

    def __init__(self,
                 student: nn.Module,
                 view: str = 'mixed_augmented',
                 start: int = 0) -> None:
        super().__init__()
        if not isinstance(student, HRDASegmentor):
            raise ValueError(
                'model.views.* = UnsureDetail says where HRDA takes its '
                f'detail, but model.segmentor.type = {type(student).__name__}'
                " has none: remove it, or use 'HRDASegmentor'.")
        if start < 0:
            raise ValueError(
                f'model.views.*.start must be at least 0, got {start}.')
        self.view = view
        self.needs = (view, )
        self.start = start

    def forward(self, step: Step, name: str) -> View:
        """The view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.
        """
        detail = 'unsure' if step.iteration >= self.start else 'random'
        return step.view(self.view).replace(name=name, detail=detail)
