"""The segmentor that adapts another one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.structures import PixelData
from mmseg.models.segmentors.base import BaseSegmentor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..models import Clock, DomainDataPreprocessor, batched_slide
from ..ops import normalized
from . import graph
from .backward import MODES, sequential_train_step
from .objectives import Segmentation
from .state_dict import RESERVED_ROOTS, transparent_state_dict
from .step import Step
from .students import StudentAdapter
from .view import View

_PREDICTORS = ('student', 'teacher', 'both')


@MODELS.register_module()
class UDASegmentor(BaseSegmentor):
    """One iteration is a sum of objectives over views.

    .. code:: text

        loss(batch)
          teachers        follow the student
          for objective:  step.view(...)          streams, mixes, masks
                          step.teacher(...)       probabilities
                          step.pseudo_label(...)  labels and weights
                          step.student(...)       features, logits
          state           updated once, after all losses

    Each part of a step is computed when first asked for, and once. Its
    student is any EncoderDecoder or CascadeEncoderDecoder config of mmseg.

    Args:
        segmentor (dict or nn.Module): The student, a stock model config.
        teachers (dict): By name; such as ``ema=dict(type='EMATeacher')``.
        pseudo_labels (dict): Policies by name.
        views (dict): View modules by name, besides the loader's streams.
        objectives (dict): Objectives by name; the name prefixes log keys.
        state (dict): Modules that several parts share, by name, with an
            ``update(step)`` that is called after all losses.
        predict_with (str): Which net validation and test use: 'student',
            'teacher', or 'both' (the teacher's as ``teacher_pred_sem_seg``).
        backward (str): 'sum' adds up all losses first. 'sequential'
            backpropagates each group of objectives that share a pass of the
            student at once, which frees its activations before the next one
            runs: the same gradients with less memory. On several GPUs it
            needs ``model_wrapper_cfg =
            dict(type='UDADistributedDataParallel')``.
        joint_views (Sequence[str]): Views that the backbone sees in one pass,
            such as ``('source', 'mixed_strong')``: fewer, larger kernels.
            The same features, but for other draws of stochastic depth; a
            backbone with batch norms is refused.
        channels_last (bool): Keep convolutions of student and teachers in
            this layout, which tensor cores want in half precision.
        data_preprocessor (dict, optional): As Runner injects it; must equal
            the student's.
        backbone, neck, decode_head, auxiliary_head, pretrained, train_cfg,
            test_cfg: Only to name the right key when they are set at the
            place where a stock config has them.
        init_cfg (dict, optional): Not used; the student has its own.

    Raises:
        ValueError: If a key is misplaced, a name unknown or the student can't
            be adapted.
    """

    def __init__(self,
                 segmentor: dict | nn.Module,
                 teachers: dict[str, dict] | None = None,
                 pseudo_labels: dict[str, dict] | None = None,
                 views: dict[str, dict] | None = None,
                 objectives: dict[str, dict] | None = None,
                 state: dict[str, dict] | None = None,
                 predict_with: str = 'student',
                 backward: str = 'sum',
                 joint_views: Sequence[str] = (),
                 channels_last: bool = False,
                 data_preprocessor: dict | None = None,
                 backbone: dict | None = None,
                 neck: dict | None = None,
                 decode_head: dict | None = None,
                 auxiliary_head: dict | None = None,
                 pretrained: str | None = None,
                 train_cfg: dict | None = None,
                 test_cfg: dict | None = None,
                 init_cfg: dict | None = None) -> None:
        _refuse_misplaced(
            backbone=backbone, neck=neck, decode_head=decode_head,
            auxiliary_head=auxiliary_head, pretrained=pretrained,
            train_cfg=train_cfg, test_cfg=test_cfg, init_cfg=init_cfg)
        if predict_with not in _PREDICTORS:
            raise ValueError(f'model.predict_with must be one of '
                             f'{_PREDICTORS}, got {predict_with!r}.')
        if backward not in MODES:
            raise ValueError(f'model.backward must be one of {MODES}, got '
                             f'{backward!r}.')
        student = _build_student(segmentor, data_preprocessor)
        super().__init__(data_preprocessor=DomainDataPreprocessor(
            student.data_preprocessor))
        self.segmentor = student
        self.adapter = StudentAdapter(student)
        self.clock = Clock()
        offers = dict(
            student=student,
            num_classes=student.num_classes,
            normalize=_normalization(student.data_preprocessor))
        self.teachers = _build('teachers', teachers, offers)
        self.pseudo_labels = _build('pseudo_labels', pseudo_labels, offers)
        self.views = _build('views', views, offers)
        self.objectives = _build('objectives', objectives, offers)
        self.state = _build('state', state, offers)
        if not self.objectives:
            raise ValueError('model.objectives is empty: name at least one, '
                             "such as source=dict(type='Segmentation', "
                             "view='source').")
        if predict_with != 'student' and not self.teachers:
            raise ValueError(f'model.predict_with = {predict_with!r} needs a '
                             'teacher in model.teachers.')
        self.predict_with = predict_with
        self.backward_mode = backward
        self.joint_views = tuple(joint_views)
        self.groups = graph.groups(
            self.objectives, graph.check(self), self.joint_views)
        # One order in both modes: batch norms record passes in it.
        self.order = [name for group in self.groups for name in group]
        self.trains_all = any(isinstance(one, Segmentation)
                              for one in self.objectives.values())
        self._weights: list[Tensor] | None = None
        self.norm_views = {
            view for objective in self.objectives.values()
            if getattr(objective, 'update_norm', False)
            for view in objective.needs}
        self._mode: bool | None = None
        self.keep_step = False
        self.last_step: Step | None = None
        transparent_state_dict(self)
        if channels_last:
            # Here, so that optimizer and wrapper see no other layout.
            self.to(memory_format=torch.channels_last)

    # What stock tools ask of any segmentor is the student's.

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone."""
        return self.segmentor.backbone

    @property
    def decode_head(self) -> nn.Module:
        """The student's decode head."""
        return self.segmentor.decode_head

    @property
    def align_corners(self) -> bool:
        """The student's align_corners."""
        return self.segmentor.align_corners

    @property
    def num_classes(self) -> int:
        """The student's number of classes."""
        return self.segmentor.num_classes

    @property
    def out_channels(self) -> int:
        """The student's number of output channels."""
        return self.segmentor.out_channels

    @property
    def test_cfg(self) -> dict | None:
        """The student's test_cfg."""
        return self.segmentor.test_cfg

    def extract_feat(self, inputs: Tensor) -> Any:
        """Features of the student."""
        return self.segmentor.extract_feat(inputs)

    def encode_decode(self, inputs: Tensor,
                      batch_img_metas: list[dict]) -> Tensor:
        """Logits of the student."""
        return self.segmentor.encode_decode(inputs, batch_img_metas)

    def _forward(self, inputs: Tensor,
                 data_samples: list[SegDataSample] | None = None) -> Any:
        return self.segmentor._forward(inputs, data_samples)

    def init_weights(self) -> None:
        """Initialise the student and what else is trained, never a teacher."""
        self.segmentor.init_weights()
        for group in (self.views, self.objectives, self.state,
                      self.pseudo_labels):
            for module in group.values():
                if hasattr(module, 'init_weights'):
                    module.init_weights()

    def train(self, mode: bool = True) -> UDASegmentor:
        """As any module; evaluation lets go of a kept step.

        mmengine asks for it in each iteration: nothing is walked through if
        nothing changes.
        """
        if not mode:
            self.last_step = None
        if mode == self._mode == self.segmentor.training:
            return self
        self._mode = mode
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A kept step holds parts of a graph, which can't be copied.
        return dict(self.__dict__, last_step=None)

    def loss(self, inputs: dict[str, Tensor],
             data_samples: dict[str, list[SegDataSample]]) -> dict:
        """One iteration.

        Args:
            inputs (dict[str, Tensor]): Images ``(N, 3, H, W)`` by stream.
            data_samples (dict): Samples by stream.

        Returns:
            dict[str, Tensor]: Losses and, under names without 'loss', what
            else is logged.

        Raises:
            ValueError: If the batch has no streams.
        """
        if not isinstance(inputs, Mapping):
            raise ValueError(
                'UDASegmentor trains on named streams: set '
                "train_dataloader.dataset.type = 'StreamDataset'.")
        if self.backward_mode != 'sum' and get_world_size() > 1:
            raise ValueError(
                "model.backward = 'sequential' on several GPUs needs "
                "model_wrapper_cfg = dict(type='UDADistributedDataParallel')"
                ': the stock wrapper has one backward.')
        step = self.begin(inputs, data_samples)
        losses = self.evaluate(step, self.order)
        return {**losses, **self.finish(step)}

    def train_step(self, data: dict,
                   optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Forward, backward and update, as of any model of mmengine.

        Args:
            data (dict): A batch of the loader.
            optim_wrapper (OptimWrapper): The optimizer.

        Returns:
            dict[str, Tensor]: What is logged.
        """
        if self.backward_mode == 'sum':
            return super().train_step(data, optim_wrapper)
        return sequential_train_step(self, data, optim_wrapper)

    def begin(self, inputs: dict[str, Tensor],
              data_samples: dict[str, list[SegDataSample]]) -> Step:
        """The first part of :meth:`loss`: teachers follow the student."""
        step = self._step(inputs, data_samples)
        for name, teacher in self.teachers.items():
            if hasattr(teacher, 'update'):
                step.log(f'{name}.momentum', torch.tensor(
                    teacher.update(self.segmentor)))
        return step

    def evaluate(self, step: Step, names: list[str]) -> dict[str, Tensor]:
        """The second part: losses of some objectives, by log key."""
        losses = {}
        for name in names:
            for key, value in self.objectives[name](step).items():
                losses[f'{name}.{key}'] = value
        if self.order[0] in names and not self.trains_all:
            first = next(key for key in losses if 'loss' in key)
            losses[first] = losses[first] + self._no_gradient()
        return losses

    def _no_gradient(self) -> Tensor:
        """A zero of all weights of the student.

        Contrast alone uses no classifier, and perhaps no last stage of the
        backbone, but DDP waits for all gradients.
        """
        if self._weights is None:
            self._weights = [weight for weight in self.segmentor.parameters()
                             if weight.requires_grad]
        return sum((weight.sum() for weight in self._weights),
                   torch.zeros(())) * 0

    def finish(self, step: Step) -> dict[str, Tensor]:
        """The last part: states move on; what else is logged."""
        for module in self.state.values():
            module.update(step)
        self.clock.tick()
        self.last_step = step if self.keep_step else None
        return step.logs

    def _step(self, inputs: dict[str, Tensor],
              data_samples: dict[str, list[SegDataSample]]) -> Step:
        hub = MessageHub.get_current_instance()
        iteration = self.clock.now()
        total = hub.get_info('max_iters', None)
        streams = {name: _stream_view(name, images, data_samples[name])
                   for name, images in inputs.items()}
        missing = graph.streams_needed(self) - set(streams)
        if missing:
            raise ValueError(
                f'model needs a stream or view named {sorted(missing)[0]!r}, '
                f'but train_dataloader.dataset.streams has '
                f'{sorted(streams)} and model.views {sorted(self.views)}.')
        return Step(
            self, streams, iteration,
            min(iteration / total, 1.) if total else 0.,
            int(hub.get_info('seed', None) or 0), get_rank())

    def predict(self, inputs: Tensor,
                data_samples: list[SegDataSample] | None = None
                ) -> list[SegDataSample]:
        """Predictions by student, teacher or both.

        Args:
            inputs (Tensor): Images, ``(N, 3, H, W)``.
            data_samples (list[SegDataSample], optional): Their samples.

        Returns:
            list[SegDataSample]: With ``pred_sem_seg`` and ``seg_logits``, and
            ``teacher_`` forms of them if both were asked for.
        """
        if self.predict_with == 'student':
            return _predict(self.segmentor, inputs, data_samples)
        teacher = next(iter(self.teachers.values())).model
        taught = _predict(teacher, inputs, data_samples)
        if self.predict_with == 'teacher':
            return taught
        kept = [(one.pred_sem_seg.data, one.seg_logits.data)
                for one in taught]
        results = _predict(self.segmentor, inputs, data_samples)
        for result, (labels, logits) in zip(results, kept, strict=True):
            result.set_data(dict(
                teacher_pred_sem_seg=PixelData(data=labels),
                teacher_seg_logits=PixelData(data=logits)))
        return results


def _predict(segmentor: nn.Module, inputs: Tensor,
             data_samples: list[SegDataSample] | None
             ) -> list[SegDataSample]:
    """Its own ``predict``, with as many windows at a time as asked for."""
    with batched_slide(segmentor):
        return segmentor.predict(inputs, data_samples)


def _refuse_misplaced(**stock: Any) -> None:
    """Name the right key for one set at a stock config's place."""
    for key, value in stock.items():
        if value:
            raise ValueError(
                f'model.{key} belongs to the student: set '
                f'model.segmentor.{key}.')


def _plain(value: Any) -> Any:
    """Configs compared by value: tuples as lists, ConfigDicts as dicts."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _build_student(segmentor: dict | nn.Module,
                   data_preprocessor: dict | None) -> nn.Module:
    if isinstance(segmentor, nn.Module):
        return segmentor
    own = segmentor.get('data_preprocessor')
    if own is None:
        segmentor = dict(segmentor, data_preprocessor=data_preprocessor)
    elif (isinstance(own, Mapping) and data_preprocessor is not None
          and _plain(own) != _plain(data_preprocessor)):
        raise ValueError(
            'the top-level data_preprocessor differs from '
            'model.segmentor.data_preprocessor: change both, or leave the '
            'top-level one out.')
    student = MODELS.build(segmentor)
    for root, _ in student.named_children():
        if root in RESERVED_ROOTS:
            raise ValueError(
                f'model.segmentor.type = {type(student).__name__} has a part '
                f'named {root!r}, a name that checkpoints of UDASegmentor '
                'reserve.')
    return student


def _normalization(base: nn.Module) -> tuple[Tensor, Tensor]:
    if getattr(base, '_enable_normalize', False):
        return base.mean, base.std
    return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)


def _build(group: str, configs: dict[str, dict] | None,
           offers: dict[str, Any]) -> nn.ModuleDict:
    """Build one named group of parts.

    Args:
        group (str): Name of the group, for messages.
        configs (dict, optional): Config or module by name.
        offers (dict): What the model has to give; a part gets those that its
            constructor names and its config does not set.
    """
    built = nn.ModuleDict()
    for name, config in (configs or {}).items():
        where = f'model.{group}.{name}'
        if '.' in name or 'loss' in name:
            raise ValueError(
                f"{where}: a name may hold neither '.' nor 'loss', since it "
                'prefixes log keys.')
        if isinstance(config, nn.Module):
            built[name] = config
            continue
        config = dict(config)
        kind = config.pop('type', None)
        cls = MODELS.get(kind) if isinstance(kind, str) else kind
        if cls is None:
            raise ValueError(f'{where}.type = {kind!r} is not registered.')
        known = inspect.signature(cls).parameters
        wrong = set(config) - set(known)
        if wrong:
            raise ValueError(
                f'{where} has the unknown key {sorted(wrong)[0]!r}; '
                f'{cls.__name__} knows {sorted(set(known) - set(offers))}.')
        given = {key: value for key, value in offers.items()
                 if key in known and key not in config}
        try:
            built[name] = cls(**config, **given)
        except ValueError as error:
            # A part does not know the name that the config gave it.
            raise ValueError(
                str(error).replace(f'model.{group}.*', where)) from error
    return built


def _stream_view(name: str, images: Tensor,
                 samples: list[SegDataSample]) -> View:
    """A stream of the loader as a view."""
    labels = valid = None
    extras = {}
    if 'gt_sem_seg' in samples[0]:
        labels = torch.cat([one.gt_sem_seg.data for one in samples]).long()
    if any('valid_region' in one for one in samples):
        valid = torch.stack([
            one.valid_region.data[0].bool() if 'valid_region' in one
            else torch.ones(images.shape[-2:], dtype=torch.bool,
                            device=images.device) for one in samples])
    if all('gt_edge_map' in one for one in samples):
        extras['edges'] = torch.cat(
            [one.gt_edge_map.data for one in samples]).long()
    extras.update(_stored_labels(images, samples))
    return View(name=name, images=images, domain=name, labels=labels,
                valid=valid, metas=[one.metainfo for one in samples],
                extras=extras)


def _stored_labels(images: Tensor, samples: list[SegDataSample]
                   ) -> dict[str, Tensor]:
    """Pseudo-labels from files: hard ids, or soft ones that sum to 1."""
    found = {}
    for field, empty in (('pseudo_label', 255), ('pseudo_probs', 0)):
        if all(field in one for one in samples):
            # mmseg pads images alone, to the right and below.
            found[field] = torch.stack([F.pad(
                one.get(field).data,
                (0, images.shape[-1] - one.get(field).shape[-1],
                 0, images.shape[-2] - one.get(field).shape[-2]),
                value=empty) for one in samples])
    if 'pseudo_label' in found:
        found['pseudo_label'] = found['pseudo_label'][:, 0].long()
    if 'pseudo_probs' in found:
        found['pseudo_probs'] = normalized(found['pseudo_probs'].float())
    return found
