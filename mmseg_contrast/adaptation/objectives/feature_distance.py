"""Stay near the features of the pretrained backbone, on thing classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from mmengine.dist import broadcast
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import downscale_labels, masked_feature_distance

if TYPE_CHECKING:
    from ..step import Step

#: Thing classes of Cityscapes: traffic light and sign, person to bicycle.
CITYSCAPES_THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)


@MODELS.register_module()
class FeatureDistance(nn.Module):
    r"""Thing-class ImageNet feature distance (Hoyer et al., CVPR 2022, eq. 6).

    .. math:: \lambda \frac{\sum_p M_p \lVert F(x)_p - F_0(x)_p \rVert_2}
        {\sum_p M_p}

    with the student's features F, those :math:`F_0` of its pretrained
    backbone, frozen and in evaluation mode, and the mask M of the positions
    where the down-scaled label is a thing class. Without such a position it
    is 0, with zero gradients. With HRDA, x is the context, the image at low
    resolution.

    The frozen backbone is a copy of the student's, made when the weights are
    initialised: the file is read once, and testing needs none of it. It is in
    no optimizer and in no checkpoint; a resumed run reads the pretrained
    weights again, as the student does.

    Args:
        student (nn.Module): The segmentor.
        num_classes (int): Its classes.
        view (str): A labelled view.
        weight (float): lambda.
        classes (Sequence[int]): Thing classes.
        min_ratio (float): Share of a position's pixels that its class must
            cover, in [0, 1].
        stage (int): Which output of the backbone; -1 is the last.
        encoder (dict, optional): Config of another frozen backbone with an
            ``init_cfg``, whose features have the same shape.

    Raises:
        ValueError: If an argument is out of range.
    """

    update_norm = False

    def __init__(self,
                 student: nn.Module,
                 num_classes: int,
                 view: str = 'source',
                 weight: float = 0.005,
                 classes: Sequence[int] = CITYSCAPES_THINGS,
                 min_ratio: float = 0.75,
                 stage: int = -1,
                 encoder: dict | None = None) -> None:
        super().__init__()
        wrong = not isinstance(classes, Sequence) or not all(
            isinstance(c, int) and 0 <= c < num_classes for c in classes)
        if wrong or not classes:
            raise ValueError(
                'model.objectives.*.classes of FeatureDistance must be some '
                f'of the ids 0 to {num_classes - 1}, got {classes!r}.')
        if not isinstance(stage, int):
            raise ValueError('model.objectives.*.stage must be a number, got '
                             f'{stage!r}.')
        if not (isinstance(min_ratio, (int, float)) and 0 <= min_ratio <= 1):
            raise ValueError('model.objectives.*.min_ratio must lie in '
                             f'[0, 1], got {min_ratio}.')
        self.view = view
        self.needs = (view, )
        self.num_classes = num_classes
        self.weight = weight
        self.min_ratio = min_ratio
        self.stage = stage
        # Up to 255: ignored positions look up "no thing".
        things = torch.zeros(256, dtype=torch.bool)
        things[list(classes)] = True
        self.register_buffer('things', things, persistent=False)
        # Lists hide modules from parameters(), state_dict() and DDP.
        self._student = [student]
        self._encoder_config = encoder
        self._encoder: list[nn.Module] = []

    def init_weights(self) -> None:
        """Freeze a copy of the student's backbone, freshly initialised.

        Later calls change nothing: the student has been trained since.

        Raises:
            ValueError: If nothing says that its weights are pretrained.
        """
        if self._encoder:
            return
        own = self._encoder_config is not None
        encoder = (MODELS.build(self._encoder_config) if own
                   else self._student[0].backbone)
        if not is_pretrained(encoder):
            where = ('the objective\'s encoder' if own
                     else 'model.segmentor.backbone')
            raise ValueError(
                'FeatureDistance compares with pretrained features, but '
                f'{where} has none: set its init_cfg='
                "dict(type='Pretrained', checkpoint=...).")
        if own:
            encoder.init_weights()
        else:
            encoder = copy.deepcopy(encoder)
        # All ranks compare with the same weights, whatever was not in the
        # file and drawn instead.
        for tensor in chain(encoder.parameters(), encoder.buffers()):
            broadcast(tensor.data)
        self.freeze(encoder)

    def freeze(self, encoder: nn.Module) -> None:
        """Compare with this network from now on.

        Args:
            encoder (nn.Module): A backbone.
        """
        encoder.to(self.things.device).requires_grad_(False)
        encoder.eval()  # whose result is None in some of mmseg's backbones
        self._encoder = [encoder]

    @property
    def encoder(self) -> nn.Module | None:
        """The frozen backbone, once there is one."""
        return self._encoder[0] if self._encoder else None

    def _apply(self, fn: Callable, recurse: bool = True) -> FeatureDistance:
        for encoder in self._encoder:
            encoder._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The distance, times its weight.

        Args:
            step (Step): The iteration.

        Returns:
            dict[str, Tensor]: ``loss_feature_distance``, 0-d.

        Raises:
            ValueError: If the view has no labels, the student's features
                can't be seen, or labels and features don't fit.
        """
        if self.encoder is None:
            raise ValueError(
                'FeatureDistance has no frozen backbone yet: call '
                'model.init_weights() before training, as Runner does.')
        view = step.view(self.view)
        student = step.student(self.view)
        stages = student.backbone_features
        if view.labels is None or stages is None:
            raise ValueError(
                f'FeatureDistance on the view {self.view!r} needs labels and '
                "a student whose extract_feat is EncoderDecoder's.")
        if not -len(stages) <= self.stage < len(stages):
            raise ValueError(
                f'FeatureDistance(stage={self.stage}): the backbone has '
                f'{len(stages)} outputs.')
        with torch.no_grad():
            reference = self.encoder(
                student.backbone_images, **view.inputs)[self.stage]
        features = stages[self.stage]
        if reference.shape != features.shape:
            raise ValueError(
                'FeatureDistance needs an encoder whose features are like the '
                f"student's, {tuple(features.shape)}, but they are "
                f'{tuple(reference.shape)}.')
        labels = downscale_labels(
            view.labels, _factor(view.labels, features), self.num_classes,
            self.min_ratio)
        mask = self.things[labels]
        step.log(f'{self.view}.thing_ratio', mask.float().mean())
        distance = masked_feature_distance(features, reference, mask)
        return dict(loss_feature_distance=self.weight * distance)


def _factor(labels: Tensor, features: Tensor) -> int:
    """Pixels per position, the same in height and width."""
    height, width = features.shape[2:]
    factor = labels.shape[-1] // width
    if labels.shape[-2:] != (height * factor, width * factor):
        raise ValueError(
            'FeatureDistance needs crops whose sides are multiples of the '
            f'stride of the features: {tuple(labels.shape[-2:])} pixels gave '
            f'{height} x {width} positions; change crop_size.')
    return factor


def is_pretrained(backbone: nn.Module) -> bool:
    """Whether the config names a file for a backbone's weights.

    Args:
        backbone (nn.Module): Any backbone of mmseg.
    """
    configs = getattr(backbone, 'init_cfg', None) or ()
    if isinstance(configs, Mapping):
        configs = (configs, )
    return (any('checkpoint' in config for config in configs)
            or bool(getattr(backbone, 'pretrained', None)))
