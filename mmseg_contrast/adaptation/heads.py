"""One small adapter for each kind of decode head in mmseg.

An adapter knows what a head returns in training, which of its losses meets
which logits and labels, and so gives all of them a weight map. Heads that
are not known, but have a ``loss`` of their own, go through it as a whole
(:class:`WholeHead`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..models.classifier_input import Seen
from ..ops import crop_to_box, full_precision
from ..ops.crop_box import AnyBox
from .losses import IGNORE, WeightParts, check_loss, weighted_loss


@dataclass
class Target:
    """Labels of a view with their weights.

    Args:
        labels (Tensor): int64, ``(N, H, W)``.
        weights (Tensor, optional): ``(N, H, W)``; None is 1 everywhere.
        parts (WeightParts, optional): See :class:`View`.
        edges (Tensor, optional): Class boundaries, int64, ``(N, H, W)``.
    """

    labels: Tensor
    weights: Tensor | None = None
    parts: WeightParts | None = None
    edges: Tensor | None = None

    def crop(self, box: AnyBox) -> Target:
        """The same inside a box.

        Args:
            box (AnyBox): In pixels: top, bottom, left, right.
        """
        def cut(maps: Tensor | None) -> Tensor | None:
            return None if maps is None else crop_to_box(maps, box)

        parts = None if self.parts is None else tuple(
            (scale, crop_to_box(mask, box)) for scale, mask in self.parts)
        return Target(crop_to_box(self.labels, box), cut(self.weights), parts,
                      cut(self.edges))


@dataclass
class Piece:
    """Logits with the losses and labels they meet.

    Args:
        key (str): Log key; ``{}`` stands for the loss's own name.
        logits (Tensor): ``(N, C, h, w)`` or, at points, ``(N, C, P)``.
        losses (Sequence[nn.Module]): Losses on these logits, summed by name.
        target (Target): Labels and weights.
        weight (float): Factor on these losses.
    """

    key: str
    logits: Tensor
    losses: Sequence[nn.Module]
    target: Target
    weight: float = 1.


def _as_list(losses: nn.Module) -> list[nn.Module]:
    return list(losses) if isinstance(losses, nn.ModuleList) else [losses]


class PlainHead:
    """A head with one map of logits and mmseg's own ``loss_by_feat``.

    Args:
        head (BaseDecodeHead): The head.
        where (str): Its config key, for messages.
        train_cfg (dict, optional): The segmentor's train_cfg.
    """

    def __init__(self, head: nn.Module, where: str,
                 train_cfg: dict | None = None) -> None:
        self.head = head
        self.where = where
        self.train_cfg = train_cfg
        self.ignore_index = getattr(head, 'ignore_index', IGNORE)
        self._takes_map = [
            (loss, check_loss(loss, channels, f'{where}.loss_decode',
                              self.ignore_index))
            for loss, channels in self.loss_channels()]

    @property
    def folds(self) -> bool:
        """Whether some loss needs the weights folded into the labels."""
        return not all(takes for _, takes in self._takes_map)

    def takes_map(self, loss: nn.Module) -> bool:
        """Whether a loss of this head takes a weight map."""
        return next(takes for one, takes in self._takes_map if one is loss)

    def loss_channels(self) -> list[tuple[nn.Module, int]]:
        """Every loss with the number of channels of its logits."""
        return [(loss, self.head.out_channels)
                for loss in _as_list(self.head.loss_decode)]

    def outputs(self, features: Any, previous: Any) -> Any:
        """What the head returns in training.

        Args:
            features (Sequence[Tensor]): Outputs of backbone and neck.
            previous (Tensor, optional): Logits of the stage before.
        """
        # Called, not forward(): a compiled head must be asked this way.
        if previous is None:
            return self.head(features)
        return self.head(features, previous)

    def logits(self, outputs: Any) -> Tensor:
        """The map of logits that stands for the head's prediction."""
        return outputs

    def classified(self, outputs: Any, seen: Seen) -> Tensor | None:
        """What the head classifies, ``(N, D, h, w)``, where that is known.

        Args:
            outputs (Any): What :meth:`outputs` returned.
            seen (Seen): What went through its classifier.
        """
        return seen.features

    def resolutions(self, outputs: Any, seen: Seen
                    ) -> list[tuple[Tensor | None, AnyBox | None]]:
        """What is classified at each resolution, with the box it shows.

        Args:
            outputs (Any): What :meth:`outputs` returned.
            seen (Seen): What went through its classifier.
        """
        return [(self.classified(outputs, seen), None)]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:
        """All logits with their losses and labels."""
        return [Piece('{}', outputs, _as_list(self.head.loss_decode), target)]

    def losses(self, features: Any, outputs: Any, previous: Any,
               target: Target) -> dict[str, Tensor]:
        """All losses of the head.

        Args:
            features (Sequence[Tensor]): Outputs of backbone and neck.
            outputs (Any): What :meth:`outputs` returned for them.
            previous (Tensor, optional): Logits of the stage before.
            target (Target): Labels and weights.

        Returns:
            dict[str, Tensor]: By the names that mmseg uses.
        """
        result: dict[str, Tensor] = {}
        for piece in self.pieces(outputs, target):
            logits, goal = piece.logits, piece.target
            # Resized and compared with labels in full precision.
            logits = full_precision(logits)
            if logits.dim() == 4:
                logits = F.interpolate(
                    logits, goal.labels.shape[-2:], mode='bilinear',
                    align_corners=self.head.align_corners)
            weights = self._with_sampler(logits, goal)
            for loss in piece.losses:
                key = piece.key.format(loss.loss_name)
                value = weighted_loss(
                    loss, logits, goal.labels, weights, goal.parts,
                    self.takes_map(loss), self.ignore_index)
                value = value * piece.weight
                result[key] = result[key] + value if key in result else value
        return result

    def _with_sampler(self, logits: Tensor, goal: Target) -> Tensor | None:
        """Weights times those of the head's own pixel sampler (OHEM)."""
        sampler = getattr(self.head, 'sampler', None)
        if sampler is None:
            return goal.weights
        sampled = sampler.sample(logits, goal.labels.unsqueeze(1))
        sampled = sampled.view_as(goal.labels)
        return sampled if goal.weights is None else sampled * goal.weights


class DualAttentionHead(PlainHead):
    """DANet: three maps with the same losses."""

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[0]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        losses = _as_list(self.head.loss_decode)
        return [Piece(f'{name}.{{}}', logits, losses, target)
                for name, logits in zip(('pam_cam', 'pam', 'cam'), outputs,
                                        strict=True)]


class EncodingHead(PlainHead):
    """EncNet: a map of logits and the classes present in the image."""

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[0] if self.head.use_se_loss else outputs

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        return super().pieces(self.logits(outputs), target)

    def losses(self, features: Any, outputs: Any, previous: Any,
               target: Target) -> dict[str, Tensor]:
        """See :meth:`PlainHead.losses`; adds the image-level one."""
        result = super().losses(features, outputs, previous, target)
        if not self.head.use_se_loss:
            return result
        classes = self.head.num_classes
        flat = target.labels.flatten(1)
        inside = (flat >= 0) & (flat < classes)
        present = torch.zeros(
            len(flat), classes + 1, dtype=flat.dtype, device=flat.device)
        present.scatter_(1, torch.where(inside, flat, classes), 1)
        weight = None
        if target.weights is not None:
            weight = target.weights.mean((1, 2)).unsqueeze(1).expand(
                -1, classes)
        result['loss_se'] = self.head.loss_se_decode(
            outputs[1], present[:, :-1], weight=weight)
        return result


class DeepDualResolutionHead(PlainHead):
    """DDRNet: a context and a spatial map, one loss each."""

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[0]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        return [Piece(f'loss_{name}', logits, [loss], target)
                for name, logits, loss in zip(
                    ('context', 'spatial'), outputs, self.head.loss_decode,
                    strict=True)]


class PIDHead(PlainHead):
    """PIDNet: two maps, a boundary map, and the map near boundaries."""

    def loss_channels(self) -> list[tuple[nn.Module, int]]:  # noqa: D102
        channels = [self.head.out_channels] * 4
        channels[2] = 1
        return list(zip(self.head.loss_decode, channels, strict=True))

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[1]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        proportional, integral, derivative = outputs
        edges = target.edges
        if edges is None:
            edges = class_edges(target.labels, self.ignore_index)
        boundary = F.interpolate(
            derivative, target.labels.shape[-2:], mode='bilinear',
            align_corners=self.head.align_corners)
        # The published threshold: only pixels surely at a boundary.
        near = boundary[:, 0].sigmoid() > 0.8
        losses = self.head.loss_decode
        at_edges = Target(edges, target.weights, target.parts)
        near_edges = Target(
            torch.where(near, target.labels, self.ignore_index),
            target.weights, target.parts)
        return [
            Piece('loss_sem_p', proportional, [losses[0]], target),
            Piece('loss_sem_i', integral, [losses[1]], target),
            Piece('loss_bd', derivative, [losses[2]], at_edges),
            Piece('loss_sem_bd', integral, [losses[3]], near_edges),
        ]


class DetailHead(PlainHead):
    """STDC's detail branch: its labels are boundaries at three scales."""

    def loss_channels(self) -> list[tuple[nn.Module, int]]:  # noqa: D102
        return [(loss, self.head.out_channels)
                for loss in _as_list(self.head.loss_decode)]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        details = detail_labels(target.labels, self.head.laplacian_kernel,
                                self.head.fusion_kernel,
                                self.head.boundary_threshold)
        return super().pieces(
            outputs, Target(details, target.weights, target.parts))


class IterativeHead(PlainHead):
    """K-Net: one map for each update of the kernels, the last one counts."""

    def loss_channels(self) -> list[tuple[nn.Module, int]]:  # noqa: D102
        head = self.head.kernel_generate_head
        return [(loss, head.out_channels)
                for loss in _as_list(head.loss_decode)]

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[-1]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        losses = _as_list(self.head.kernel_generate_head.loss_decode)
        return [Piece(f'{{}}.s{stage}', logits, losses, target)
                for stage, logits in enumerate(outputs)]


class PointHead(PlainHead):
    """PointRend: logits at uncertain points of the stage before."""

    def outputs(self, features: Any, previous: Any) -> Any:  # noqa: D102
        from mmseg.models.decode_heads.point_head import calculate_uncertainty
        head = self.head
        chosen = head._transform_inputs(features)
        with torch.no_grad():
            points = head.get_points_train(
                previous, calculate_uncertainty, cfg=self.train_cfg)
        fine = head._get_fine_grained_point_feats(chosen, points)
        coarse = head._get_coarse_point_feats(previous, points)
        return head(fine, coarse), points, previous

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs[2]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        logits, points, _ = outputs

        def at_points(map_: Tensor) -> Tensor:
            # mmcv's point_sample, nearest: points are in [0, 1] of the image.
            picked = F.grid_sample(
                map_.unsqueeze(1).float(), points.unsqueeze(2) * 2 - 1,
                mode='nearest', align_corners=self.head.align_corners)
            return picked[:, 0, :, 0]

        weights = None if target.weights is None else at_points(
            target.weights)
        parts = None if target.parts is None else [
            (scale, at_points(mask) > 0.5) for scale, mask in target.parts]
        goal = Target(at_points(target.labels).long(), weights, parts)
        return [Piece('point{}', logits, _as_list(self.head.loss_decode),
                      goal)]


class MultiScaleHead(PlainHead):
    """HRDA: fused logits, and those of a detail with the labels inside it."""

    def __init__(self, head: nn.Module, where: str,
                 train_cfg: dict | None = None) -> None:
        super().__init__(head, f'{where}.head', train_cfg)

    def outputs(self, features: Any, previous: Any) -> Any:  # noqa: D102
        return self.head.scales(features)

    def logits(self, outputs: Any) -> Tensor:  # noqa: D102
        return outputs.fused

    def classified(self, outputs: Any, seen: Seen) -> Tensor | None:
        """What is classified in the context: it shows the whole image."""
        return outputs.context_features

    def resolutions(self, outputs: Any, seen: Seen
                    ) -> list[tuple[Tensor | None, AnyBox | None]]:
        """The context's, and the detail's."""
        return [(outputs.context_features, None),
                (outputs.detail_features, outputs.box)]

    def pieces(self, outputs: Any, target: Target) -> list[Piece]:  # noqa: D102
        losses = _as_list(self.head.loss_decode)
        return [Piece(f'{prefix}{{}}', logits, losses,
                      target if box is None else target.crop(box), weight)
                for prefix, weight, logits, box in
                self.head.weighted_parts(outputs)]


class WholeHead:
    """A head with a loss of its own, which is not known here.

    It runs once, on the labels whose weight isn't 0, and its losses are
    multiplied by the mean weight of these pixels. To ignore a pixel is left
    to the head; Mask2Former counts it as none of the masks.

    Args:
        head (nn.Module): The head.
        where (str): Its config key, for messages.
        train_cfg (dict, optional): The segmentor's train_cfg.
    """

    folds = False

    def __init__(self, head: nn.Module, where: str,
                 train_cfg: dict | None = None) -> None:
        self.head = head
        self.where = where
        self.train_cfg = train_cfg
        self.ignore_index = getattr(head, 'ignore_index', IGNORE)

    def outputs(self, features: Any, previous: Any) -> Any:
        """Nothing: the head runs inside its own loss."""
        return None

    def logits(self, outputs: Any) -> None:
        """No map of logits without another forward."""
        return None

    def classified(self, outputs: Any, seen: Seen) -> Tensor | None:
        """What went through a classifier of mmseg's kind, if it has one."""
        return seen.features

    def resolutions(self, outputs: Any, seen: Seen
                    ) -> list[tuple[Tensor | None, AnyBox | None]]:
        """See :meth:`PlainHead.resolutions`."""
        return [(seen.features, None)]

    def losses(self, features: Any, outputs: Any, previous: Any,
               target: Target) -> dict[str, Tensor]:
        """See :meth:`PlainHead.losses`."""
        labels, weights = target.labels, target.weights
        if weights is None:
            weights = torch.ones_like(labels, dtype=torch.float32)
        labels = torch.where(weights > 0, labels, self.ignore_index)
        kept = labels != self.ignore_index
        scale = (weights * kept).sum() / kept.sum().clamp_min(1)
        samples = [SegDataSample(
            gt_sem_seg=PixelData(data=one.unsqueeze(0)),
            metainfo=dict(img_shape=tuple(one.shape),
                          pad_shape=tuple(one.shape))) for one in labels]
        inputs = (features, ) if previous is None else (features, previous)
        result: dict[str, Tensor] = {}
        for key, value in self.head.loss(
                *inputs, samples, self.train_cfg).items():
            if 'loss' not in key:
                continue
            if isinstance(value, (list, tuple)):
                value = sum(one.mean() for one in value)
            result[key] = scale * value.mean()
        return result


def class_edges(labels: Tensor, ignore_index: int = IGNORE,
                width: int = 3) -> Tensor:
    """Class boundaries, ``width`` pixels wide, as 0 and 1.

    Args:
        labels (Tensor): int64, ``(N, H, W)``.
        ignore_index (int): Borders of ignored regions are no boundaries.
        width (int): Odd.

    Returns:
        Tensor: int64, ``(N, H, W)``.
    """
    edge = torch.zeros_like(labels, dtype=torch.float32)
    for axis in (1, 2):
        size = labels.shape[axis] - 1
        here, there = labels.narrow(axis, 0, size), labels.narrow(
            axis, 1, size)
        step = ((here != there) & (here != ignore_index)
                & (there != ignore_index)).float()
        edge.narrow(axis, 0, size).add_(step)
        edge.narrow(axis, 1, size).add_(step)
    wide = F.max_pool2d(edge.clamp(max=1).unsqueeze(1), width, 1, width // 2)
    return wide.squeeze(1).long()


def detail_labels(labels: Tensor, laplacian: Tensor, fusion: Tensor,
                  threshold: float) -> Tensor:
    """STDC's detail ground truth: boundaries at strides 1, 2 and 4, fused.

    Fan et al., 2021, section 3.3. Each map is where the Laplacian of the
    label ids exceeds the threshold, the fused one where their weighted sum
    does.

    Args:
        labels (Tensor): int64, ``(N, H, W)``.
        laplacian (Tensor): ``(1, 1, 3, 3)``.
        fusion (Tensor): ``(1, 3, 1, 1)``.
        threshold (float): The head's ``boundary_threshold``.

    Returns:
        Tensor: int64, ``(N, H, W)``, 0 or 1.
    """
    ids = labels.unsqueeze(1).to(laplacian)
    maps = [F.conv2d(ids, laplacian, stride=stride, padding=1)
            for stride in (1, 2, 4)]
    maps = [F.interpolate(one, labels.shape[-2:]) for one in maps]
    stacked = (torch.cat(maps, 1) > threshold).to(fusion)
    return (F.conv2d(stacked, fusion) > threshold).squeeze(1).long()


_BY_NAME = {
    'DAHead': DualAttentionHead,
    'EncHead': EncodingHead,
    'HRDAHead': MultiScaleHead,
    'DDRHead': DeepDualResolutionHead,
    'PIDHead': PIDHead,
    'STDCHead': DetailHead,
    'IterativeDecodeHead': IterativeHead,
    'PointHead': PointHead,
}
_REFUSED = ('VPDDepthHead', 'SideAdapterCLIPHead')


def adapt_head(head: nn.Module, where: str,
               train_cfg: dict | None = None) -> PlainHead | WholeHead:
    """The adapter for a head.

    Args:
        head (nn.Module): A decode or auxiliary head.
        where (str): Its config key, for messages.
        train_cfg (dict, optional): The segmentor's train_cfg.

    Raises:
        ValueError: If the head can't be trained with pixel weights.
    """
    for base in type(head).__mro__:
        if base.__name__ in _REFUSED:
            raise ValueError(
                f'{where} = {type(head).__name__} is no head that gives '
                'class probabilities from features alone; it cannot be '
                'adapted.')
        if base.__name__ in _BY_NAME:
            return _BY_NAME[base.__name__](head, where, train_cfg)
        # The class nearest to the head that says how its loss is computed.
        if 'loss' in vars(base) or 'loss_by_feat' in vars(base):
            break
    if isinstance(head, BaseDecodeHead) and (
            base.__name__ in ('BaseDecodeHead', 'BaseCascadeDecodeHead')):
        return PlainHead(head, where, train_cfg)
    if not hasattr(head, 'loss'):
        raise ValueError(f'{where} = {type(head).__name__} has no loss().')
    return WholeHead(head, where, train_cfg)
