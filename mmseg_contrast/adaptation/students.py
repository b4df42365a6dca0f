"""What objectives and teachers may ask of any segmentor of mmseg."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from torch import Tensor, nn

from ..models import (
    ContrastHead,
    ContrastLoss,
    HRDASegmentor,
    MultiScale,
    windows_per_pass,
)
from ..models.classifier_input import Seen, classifier_input
from ..ops import forked_rng, full_precision, generator_at
from ..ops.crop_box import AnyBox
from .heads import Target, adapt_head
from .view import View

_TRAINING = ('loss', '_decode_head_forward_train',
             '_auxiliary_head_forward_train')
#: Outputs of the backbone, if they can be had, and those of the neck.
Features = tuple[Sequence[Tensor] | None, Sequence[Tensor]]

_SCORE_HEADS = ('Mask2FormerHead', 'MaskFormerHead')


def _auxiliary_heads(segmentor: nn.Module
                     ) -> dict[str, tuple[nn.Module, str]]:
    """Auxiliary heads by mmseg's names, with their config keys."""
    key = 'model.segmentor.auxiliary_head'
    if not getattr(segmentor, 'with_auxiliary_head', False):
        return {}
    head = segmentor.auxiliary_head
    if isinstance(head, nn.ModuleList):
        return {f'aux_{i}': (one, f'{key}[{i}]')
                for i, one in enumerate(head)}
    return {'aux': (head, key)}


def contrast_heads(segmentor: nn.Module) -> dict[str, ContrastHead]:
    """The ContrastHeads among a segmentor's auxiliary heads.

    Args:
        segmentor (nn.Module): Any segmentor.

    Returns:
        dict[str, ContrastHead]: By mmseg's names, 'aux' or 'aux_0', 'aux_1'.
    """
    return {name: head
            for name, (head, _) in _auxiliary_heads(segmentor).items()
            if isinstance(head, ContrastHead)}


def check_segmentor(segmentor: nn.Module) -> None:
    """Refuse, by name, a segmentor that can't be adapted.

    Args:
        segmentor (nn.Module): Any model.

    Raises:
        ValueError: If it isn't an EncoderDecoder, trains in its own way, or
            its ``test_cfg.batched`` is wrong.
    """
    name = type(segmentor).__name__
    if not isinstance(segmentor, EncoderDecoder):
        raise ValueError(
            f'model.segmentor.type = {name} cannot be adapted: it is neither '
            'an EncoderDecoder nor a CascadeEncoderDecoder.')
    for method in _TRAINING:
        own = getattr(type(segmentor), method)
        if own not in (getattr(EncoderDecoder, method),
                       getattr(CascadeEncoderDecoder, method),
                       # Stock losses, but for contrast heads.
                       getattr(ContrastLoss, method, None)):
            raise ValueError(
                f'model.segmentor.type = {name} cannot be adapted: it has a '
                f'{method}() of its own, which knows no pixel weights.')
    # Stock code reads test_cfg both as a dict and by attribute.
    for key in ('test_cfg', 'train_cfg'):
        cfg = getattr(segmentor, key)
        if isinstance(cfg, dict) and not isinstance(cfg, ConfigDict):
            setattr(segmentor, key, ConfigDict(cfg))
    # Now, not at the first validation.
    windows_per_pass(segmentor.test_cfg, 'model.segmentor.test_cfg')


class StudentAdapter:
    """A segmentor seen as features, logits and weighted losses.

    Args:
        segmentor (EncoderDecoder): The segmentor; it is not owned.
    """

    def __init__(self, segmentor: nn.Module) -> None:
        check_segmentor(segmentor)
        self.segmentor = segmentor
        train_cfg = segmentor.train_cfg
        key = 'model.segmentor.decode_head'
        if isinstance(segmentor.decode_head, nn.ModuleList):
            self.decode = {
                f'decode_{i}': adapt_head(head, f'{key}[{i}]', train_cfg)
                for i, head in enumerate(segmentor.decode_head)}
        else:
            self.decode = {
                'decode': adapt_head(segmentor.decode_head, key, train_cfg)}
        self.contrast = contrast_heads(segmentor)
        self.auxiliary = {
            name: adapt_head(head, where, train_cfg)
            for name, (head, where) in _auxiliary_heads(segmentor).items()
            if name not in self.contrast}
        self._norms: list[nn.Module] | None = None

    @property
    def folding_heads(self) -> list[str]:
        """Config keys of heads whose weights are folded into labels."""
        heads = [*self.decode.values(), *self.auxiliary.values()]
        return [head.where for head in heads if head.folds]

    def features(self, view: View, generator: torch.Generator) -> Features:
        """Outputs of the backbone, and those of the neck.

        Args:
            view (View): Images ``(N, 3, H, W)``.
            generator (torch.Generator): CPU generator, for the place of a
                detail (HRDA).

        Returns:
            tuple: What the backbone gives (None if the segmentor has an
            ``extract_feat`` of its own), and what the heads get. The same
            without a neck. Both :class:`.MultiScale` with HRDA.

        Raises:
            ValueError: If the view has inputs that can't be cropped.
        """
        if isinstance(self.segmentor, HRDASegmentor):
            if view.inputs:
                raise ValueError(
                    f'the view {view.name!r} has inputs for the backbone '
                    f'besides images ({sorted(view.inputs)}), which '
                    'HRDASegmentor cannot crop.')
            return self.segmentor.multi_scale(
                view.images, generator, view.detail)
        own = type(self.segmentor).extract_feat
        if own is not EncoderDecoder.extract_feat and not view.inputs:
            return None, self.segmentor.extract_feat(view.images)
        return self._stages(view.images, **view.inputs)

    def _stages(self, images: Tensor, **inputs: Any
                ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What the backbone gives, and the neck."""
        stages = self.segmentor.backbone(images, **inputs)
        if self.segmentor.with_neck:
            return stages, self.segmentor.neck(stages)
        return stages, stages

    def joint_features(self, views: Sequence[View]) -> list[Features]:
        """What :meth:`features` gives for each view, by one pass over all.

        Args:
            views (Sequence[View]): Images of the same size, ``(N, 3, H, W)``;
                N may differ.

        Returns:
            list: As of :meth:`features`, for each view.

        Raises:
            ValueError: If images differ in size, or a view has inputs.
        """
        sizes = {view.name: tuple(view.images.shape[-2:]) for view in views}
        if len(set(sizes.values())) > 1 or any(one.inputs for one in views):
            raise ValueError(
                'model.joint_views: images of all views must have the same '
                'size, and no further inputs for the backbone, got '
                f'{sizes}.')
        counts = [len(view.images) for view in views]
        together = self._stages(torch.cat([view.images for view in views]))
        before, after = (
            zip(*(one.split(counts) for one in stages), strict=True)
            for stages in together)
        return list(zip(before, after, strict=True))

    def check_joint(self) -> None:
        """Refuse a student that can't see several views in one pass.

        Raises:
            ValueError: If it crops images, extracts features in a way of its
                own, or has batch norms that are trained.
        """
        kind = type(self.segmentor)
        reason = ''
        if kind.extract_feat is not EncoderDecoder.extract_feat:
            reason = f'{kind.__name__} extracts features in its own way'
        else:
            parts = [self.segmentor.backbone]
            if self.segmentor.with_neck:
                parts.append(self.segmentor.neck)
            for part in parts:
                if not getattr(part, 'norm_eval', False) and any(
                        isinstance(one, nn.modules.batchnorm._BatchNorm)
                        for one in part.modules()):
                    reason = (f'{type(part).__name__} has batch norms, which '
                              'would mix the statistics of the views')
        if reason:
            raise ValueError(f'model.joint_views: {reason}: leave it out.')

    def backbone_images(self, view: View) -> Tensor:
        """The images that :attr:`StudentOutput.backbone_features` are of.

        Args:
            view (View): Images ``(N, 3, H, W)``.

        Returns:
            Tensor: The view's own; with HRDA those of its context.
        """
        if isinstance(self.segmentor, HRDASegmentor):
            return self.segmentor.context(view.images)
        return view.images

    @contextmanager
    def batch_norm(self, update: bool) -> Iterator[None]:
        """Record batch statistics inside the block, or leave them alone."""
        if self._norms is None:
            # Not in the constructor: Runner replaces SyncBN after it.
            self._norms = [m for m in self.segmentor.modules()
                           if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        tracked = [] if update else [
            norm for norm in self._norms if norm.track_running_stats]
        for norm in tracked:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in tracked:
                norm.track_running_stats = True


class StudentOutput:
    """One pass of the student over one view, each head when asked for.

    Args:
        adapter (StudentAdapter): The student.
        view (View): What it sees.
        rng_keys (tuple): Position of this pass, for dropout and the like.
        update_norm (bool): Whether batch-norm statistics are recorded.
        recording (bool): Whether gradients are, as far as torch does.
        features (tuple, optional): Of this view, where a pass over several
            has given them.
    """

    def __init__(self, adapter: StudentAdapter, view: View,
                 rng_keys: tuple[int | str, ...], update_norm: bool,
                 recording: bool = True,
                 features: Features | None = None) -> None:
        self._adapter = adapter
        self._view = view
        self._rng_keys = rng_keys
        self._update_norm = update_norm
        self._recording = recording
        self._outputs: dict[str, tuple[Any, Any]] = {}
        self._seen = Seen()
        self._embeddings: dict[str, Tensor] = {}
        if features is None:
            with self._context('features'):
                features = adapter.features(
                    view, generator_at(*rng_keys, 'detail'))
        self.backbone_features, self.features = features

    @contextmanager
    def _context(self, name: str, update_norm: bool | None = None
                 ) -> Iterator[None]:
        device = self._view.images.device
        if update_norm is None:
            update_norm = self._update_norm
        with (forked_rng(device, *self._rng_keys, name),
              self._adapter.batch_norm(update_norm),
              torch.set_grad_enabled(
                  self._recording and torch.is_grad_enabled())):
            yield

    def _head(self, name: str) -> tuple[Any, Any]:
        """Outputs of a head and the logits of the stage before it."""
        if name not in self._outputs:
            previous = None
            decode = list(self._adapter.decode)
            if name in decode and decode.index(name) > 0:
                before = decode[decode.index(name) - 1]
                previous = self._adapter.decode[before].logits(
                    self._head(before)[0])
            head = (self._adapter.decode | self._adapter.auxiliary)[name]
            with self._context(name), classifier_input(head.head) as seen:
                outputs = head.outputs(self.features, previous)
            self._outputs[name] = outputs, previous
            if decode and name == decode[-1]:
                self._seen = seen
        return self._outputs[name]

    @property
    def backbone_images(self) -> Tensor:
        """The images of ``backbone_features``, ``(N, 3, h, w)``."""
        return self._adapter.backbone_images(self._view)

    @property
    def align_corners(self) -> bool:
        """How the student's logits are resized."""
        return self._adapter.segmentor.align_corners

    @property
    def logits(self) -> Tensor | None:
        """Logits of the last decode head, ``(N, C, h, w)``.

        None for heads that give none without another forward.
        """
        name, head = list(self._adapter.decode.items())[-1]
        return head.logits(self._head(name)[0])

    @property
    def image_logits(self) -> Tensor | None:
        """The logits at the images' resolution, float32 or wider."""
        logits = self.logits
        if logits is None:
            return None
        height, width = size = self._view.images.shape[-2:]
        if isinstance(self.features, MultiScale):
            # HRDA pads images in evaluation, and its logits are of all that.
            size = self.features.padded
        return F.interpolate(
            full_precision(logits), size, mode='bilinear',
            align_corners=self.align_corners)[..., :height, :width]

    @property
    def logits_if_seen(self) -> Tensor | None:
        """The logits if the last decode head has run, else None."""
        name, head = list(self._adapter.decode.items())[-1]
        if name not in self._outputs:
            return None
        return head.logits(self._outputs[name][0])

    @property
    def decoder_features(self) -> Tensor | None:
        """What the last decode head classifies, ``(N, D, h, w)``.

        Before dropout; None for heads that don't end with mmseg's cls_seg.
        With HRDA those of the context.
        """
        name, head = list(self._adapter.decode.items())[-1]
        return head.classified(self._head(name)[0], self._seen)

    @property
    def resolutions(self) -> list[tuple[Tensor | None, AnyBox | None]]:
        """What the last decode head classifies, at each resolution.

        Maps ``(N, D, h, w)``, as :attr:`decoder_features`, with the box of
        pixels that each shows; the first one, without a box, shows the whole
        image. HRDA has two, the context's and the detail's.
        """
        name, head = list(self._adapter.decode.items())[-1]
        return head.resolutions(self._head(name)[0], self._seen)

    def embed(self, name: str) -> Tensor:
        """Embeddings by a ContrastHead, ``(N, D, h, w)``, computed once.

        Args:
            name (str): 'aux', or 'aux_0' and so on.

        Raises:
            ValueError: If the head asks for what the decode head has not.
        """
        if name not in self._embeddings:
            head = self._adapter.contrast[name]
            features = self.features
            if head.features != 'backbone':
                one = (self.decoder_features if head.features == 'decoder'
                       else self.logits)
                if one is None:
                    raise ValueError(
                        'model.segmentor.auxiliary_head.features = '
                        f"{head.features!r}: the decode head doesn't end "
                        "with mmseg's cls_seg, so this cannot be seen; use "
                        "features = 'backbone'.")
                features = [one]
            # The projection's norms are used by nobody else.
            with self._context(name, update_norm=True):
                self._embeddings[name] = head.project(features)
        return self._embeddings[name]

    def losses(self, target: Target) -> dict[str, Tensor]:
        """Losses of all decode and auxiliary heads, by mmseg's names.

        A ContrastHead has none here: an objective claims it.

        Args:
            target (Target): Labels and weights.
        """
        result = {}
        heads = self._adapter.decode | self._adapter.auxiliary
        for name, head in heads.items():
            outputs, previous = self._head(name)
            with self._context(f'{name}.losses'):
                losses = head.losses(self.features, outputs, previous, target)
            result.update({f'{name}.{k}': v for k, v in losses.items()})
        return result


@torch.no_grad()
def class_probabilities(segmentor: nn.Module, images: Tensor,
                        features: Any = None) -> Tensor:
    """Class probabilities of a segmentor, at the images' resolution.

    Args:
        segmentor (EncoderDecoder): In the mode it is to be used in.
        images (Tensor): ``(N, 3, H, W)``.
        features (Any, optional): What ``extract_feat`` gave for them; used
            where the segmentor decodes in mmseg's plain way.

    Returns:
        Tensor: float32 or wider, ``(N, C, H, W)``; two classes for a head
        with one channel.
    """
    size = tuple(images.shape[-2:])
    # mmseg trusts the metas for the output's size; a training batch's own
    # ones name the size before padding.
    metas = [dict(ori_shape=size, img_shape=size, pad_shape=size,
                  padding_size=(0, 0, 0, 0)) for _ in range(len(images))]
    decode = getattr(segmentor.encode_decode, '__func__', None)
    if decode is EncoderDecoder.encode_decode:
        if features is None:
            features = segmentor.extract_feat(images)
        scores = _decode(segmentor, features, metas)
    else:
        scores = segmentor.encode_decode(images, metas)
    scores = _full_precision(scores)
    if tuple(scores.shape[-2:]) != size:
        scores = F.interpolate(scores, size, mode='bilinear',
                               align_corners=segmentor.align_corners)
    head = segmentor.decode_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if any(base.__name__ in _SCORE_HEADS for base in type(head).__mro__):
        # Sums of mask probabilities: already positive, not yet normalised.
        scores = scores.clamp_min(0)
        return scores / scores.sum(1, keepdim=True).clamp_min(1e-6)
    if scores.shape[1] == 1:
        positive = scores.sigmoid()
        return torch.cat([1 - positive, positive], 1)
    return scores.softmax(1)


def _decode(segmentor: nn.Module, features: Any, metas: list[dict]) -> Tensor:
    """Scores of the decode head, at the images' resolution."""
    head = segmentor.decode_head
    stock = (isinstance(head, BaseDecodeHead)
             and type(head).predict is BaseDecodeHead.predict)
    if not stock:
        return head.predict(features, metas, segmentor.test_cfg)
    # What predict() does, but the head is called, as a compiled one must be,
    # and logits are resized in full precision.
    return head.predict_by_feat(_full_precision(head(features)), metas)


def _full_precision(scores: Any) -> Any:
    if not isinstance(scores, Tensor):
        return scores
    return full_precision(scores)
