"""Prototypes of the target's classes, shared by policies and objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..ops import (
    gather_new,
    image_class_means,
    moved_prototypes,
    prototype_scores,
)

if TYPE_CHECKING:
    from .step import Step
    from .students import StudentOutput


@MODELS.register_module()
class PrototypeState(nn.Module):
    """Mean features of what a teacher takes for each class.

    ProDA (Zhang et al., CVPR 2021). After each step every image gives one
    vector for each class: the mean of the teacher's decoder features over
    the pixels that it predicts as this class. The first ones are averaged,
    then prototypes move slowly. The images of all ranks come one after the
    other, in the order of ranks, so prototypes are the same on all. A class
    that is not in an image is not touched by it.

    Args:
        num_classes (int): Classes of the student.
        channels (int): Channels D of the decoder features: what the decode
            head's last layer classifies.
        teacher (str): Name in ``model.teachers``.
        view (str): View whose images count.
        momentum (float): Weight of a new vector, in (0, 1].
        mean_until (int): So many vectors of a class are averaged first.
        min_pixels (int): A class with fewer in an image gives no vector.

    Raises:
        ValueError: If an argument is out of range.
    """

    mean: Tensor
    count: Tensor

    def __init__(self,
                 num_classes: int,
                 channels: int,
                 teacher: str = 'ema',
                 view: str = 'target',
                 momentum: float = 1e-4,
                 mean_until: int = 100,
                 min_pixels: int = 10) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError('model.state.*.momentum must lie in (0, 1], got '
                             f'{momentum}.')
        for key, value, least in (('channels', channels, 1),
                                  ('mean_until', mean_until, 0),
                                  ('min_pixels', min_pixels, 1)):
            if value < least:
                raise ValueError(f'model.state.*.{key} must be at least '
                                 f'{least}, got {value}.')
        self.num_classes = num_classes
        self.channels = channels
        self.teacher = teacher
        self.view = view
        self.needs = (view, )
        self.momentum = momentum
        self.mean_until = mean_until
        self.min_pixels = min_pixels
        self.register_buffer('mean', torch.zeros(num_classes, channels))
        self.register_buffer(
            'count', torch.zeros(num_classes, dtype=torch.int64))

    @property
    def exists(self) -> Tensor:
        """Which classes have a prototype, bool ``(C,)``."""
        return self.count > 0

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """Take in the images of a step; all ranks must.

        Args:
            step (Step): The iteration, after its losses.

        Raises:
            ValueError: If the decoder features have other channels.
        """
        seen = step.teacher_pass(self.teacher, self.view)
        features, logits = decoder_features(seen), seen.logits
        assert logits is not None  # heads with features have logits
        logits = F.interpolate(logits.float(), features.shape[-2:],
                               mode='bilinear', align_corners=False)
        # One channel says how likely the second of two classes is.
        labels = logits.argmax(1) if logits.shape[1] > 1 else (
            logits[:, 0] > 0).long()
        self.take(features, labels)

    @torch.no_grad()
    def take(self, features: Tensor, labels: Tensor) -> None:
        """Take in the images of a batch; all ranks must.

        Args:
            features (Tensor): ``(N, D, h, w)``, the same N on all ranks.
            labels (Tensor): int64, ``(N, h, w)``; 255 is ignored.

        Raises:
            ValueError: If D is another number.
        """
        self._check_channels(features)
        new, exists = gather_new(*image_class_means(
            features, labels, self.num_classes, self.min_pixels))
        mean, count = moved_prototypes(
            self.mean, self.count, new, exists, self.momentum,
            self.mean_until)
        self.mean.copy_(mean)
        self.count.copy_(count)

    def scores(self, features: Tensor, temperature: float) -> Tensor:
        """How near each pixel is to each prototype, as logarithms.

        Args:
            features (Tensor): ``(N, D, h, w)``, with gradients.
            temperature (float): See
                :func:`mmseg_contrast.ops.prototype_scores`.

        Returns:
            Tensor: ``(N, C, h, w)``.

        Raises:
            ValueError: If D is another number.
        """
        self._check_channels(features)
        # The update comes before the backward, which needs these.
        return prototype_scores(
            features, self.mean.clone(), self.exists, temperature)

    def _check_channels(self, features: Tensor) -> None:
        if features.shape[1] != self.channels:
            raise ValueError(
                f'model.state.*.channels = {self.channels}, but the decode '
                f'head classifies {features.shape[1]} channels.')

    def _load_from_state_dict(self, state_dict: dict[str, Tensor],
                              prefix: str, *args: Any) -> None:
        # mmengine only logs shapes that differ, and all would start anew.
        other = state_dict.get(prefix + 'mean')
        if other is not None and other.shape != self.mean.shape:
            raise ValueError(
                f'{prefix[:-1]} has prototypes {tuple(self.mean.shape)}, in '
                f'the checkpoint they are {tuple(other.shape)}: set the '
                'number of classes and model.state.*.channels of that run.')
        super()._load_from_state_dict(state_dict, prefix, *args)


def prototypes_of(step: Step, name: str, where: str) -> PrototypeState:
    """The prototypes of that name.

    Args:
        step (Step): The iteration.
        name (str): Name in ``model.state``.
        where (str): Config key that asks, for the message.

    Raises:
        ValueError: If the model has none of that name.
    """
    states = step.states
    if name not in states or not isinstance(states[name], PrototypeState):
        raise ValueError(f'{where} = {name!r} is no PrototypeState in '
                         f'model.state ({sorted(states)}).')
    return states[name]


def decoder_features(seen: StudentOutput) -> Tensor:
    """What the decode head classifies, ``(N, D, h, w)``.

    Args:
        seen (StudentOutput): A pass of student or teacher.

    Raises:
        ValueError: If this head has none.
    """
    features = seen.decoder_features
    if features is None:
        raise ValueError(
            "model.segmentor.decode_head doesn't end with mmseg's cls_seg, "
            'so it has no features that prototypes could be made of.')
    return features
