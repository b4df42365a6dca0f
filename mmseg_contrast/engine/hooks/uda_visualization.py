"""Pictures of what an iteration learned from."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor

from ...adaptation.segmentor import UDASegmentor
from ...adaptation.step import Step
from .panel import (
    Column,
    colorize,
    compose,
    default_palette,
    denormalize,
    heat,
)


def uda_model(runner: Runner, hook: str) -> UDASegmentor:
    """The model behind its wrapper.

    Args:
        runner (Runner): The runner.
        hook (str): Who asks, for the message.

    Raises:
        ValueError: If the model has no steps to look at.
    """
    model = runner.model
    if is_model_wrapper(model):
        model = model.module
    if not hasattr(model, 'keep_step'):
        raise ValueError(
            f'{hook} in custom_hooks needs a model of type UDASegmentor, got '
            f'{type(model).__name__}; remove the hook.')
    return cast(UDASegmentor, model)


def class_colors(runner: Runner,
                 num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes, from the training data.

    Args:
        runner (Runner): The runner.
        num_classes (int): For names and colours that the data don't give.

    Returns:
        tuple: Names, and uint8 RGB ``(num_classes, 3)``.
    """
    meta = getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}
    classes = meta.get('classes') or [str(c) for c in range(num_classes)]
    palette = meta.get('palette')
    if palette is None or len(palette) < len(classes):
        return list(classes), default_palette(len(classes))
    return list(classes), np.array(palette, np.uint8)[:len(classes)]


@HOOKS.register_module()
class UDAVisualizationHook(Hook):
    """Draws source, target, pseudo-label, mix and prediction.

    Each picture goes to ``<work_dir>/<out_dir>/iter_<n>.png`` and to the
    visualizer's backends as ``uda_panel``. What an iteration doesn't have is
    left out.

    Args:
        interval (int): Iterations between pictures.
        max_samples (int): Rows.
        out_dir (str): Folder below the work dir.
        first (bool): Whether the first iteration is drawn as well.
        source (str): View with labels.
        target (str): View without labels.
        pseudo_label (str): Name in ``model.pseudo_labels``.
        mixed (str): View that the student learns from.
        tile_width (int): Width of one picture in pixels.

    Raises:
        ValueError: If an argument is out of range.
    """

    # After hooks of normal priority, which change what is drawn.
    priority = 'BELOW_NORMAL'

    def __init__(self,
                 interval: int = 500,
                 max_samples: int = 2,
                 out_dir: str = 'panels',
                 first: bool = True,
                 source: str = 'source',
                 target: str = 'target',
                 pseudo_label: str = 'target',
                 mixed: str = 'mixed_strong',
                 tile_width: int = 240) -> None:
        for name, value in (('interval', interval),
                            ('max_samples', max_samples),
                            ('tile_width', tile_width)):
            if value < 1:
                raise ValueError(f'UDAVisualizationHook.{name} in '
                                 f'custom_hooks must be >= 1, got {value}.')
        self.interval = interval
        self.max_samples = max_samples
        self.out_dir = out_dir
        self.first = first
        self.source = source
        self.target = target
        self.pseudo_label = pseudo_label
        self.mixed = mixed
        self.tile_width = tile_width

    def before_train(self, runner: Runner) -> None:
        """Refuse a model without steps before training starts."""
        uda_model(runner, 'UDAVisualizationHook')

    def _due(self, runner: Runner) -> bool:
        number = runner.iter + 1
        return is_main_process() and (number % self.interval == 0
                                      or self.first and number == 1)

    # Hooks that read steps all do the same, so that they don't get in each
    # other's way: ask before the iteration, read after it, and let go of the
    # last step (it holds activations) before the next forward pass.

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Ask for the step of this iteration."""
        model = uda_model(runner, 'UDAVisualizationHook')
        model.last_step = None
        if self._due(runner):
            model.keep_step = True

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Draw the step."""
        model = uda_model(runner, 'UDAVisualizationHook')
        model.keep_step = False
        if not self._due(runner) or model.last_step is None:
            return
        classes, palette = class_colors(runner, model.num_classes)
        columns, threshold = self._columns(model, model.last_step, palette)
        if not columns:
            return
        panel = compose(
            columns, classes, palette, threshold=threshold,
            scale_bar=any(c.title == 'confidence' for c in columns),
            tile_width=self.tile_width)
        number = runner.iter + 1
        path = Path(runner.work_dir, self.out_dir, f'iter_{number:06d}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        # bytes by Python, since OpenCV can't write to all paths everywhere
        _, png = cv2.imencode('.png', cv2.cvtColor(panel, cv2.COLOR_RGB2BGR))
        path.write_bytes(png.tobytes())
        runner.visualizer.add_image('uda_panel', panel, step=number)

    def _columns(self, model: UDASegmentor, step: Step, palette: np.ndarray
                 ) -> tuple[list[Column], float | None]:
        """What there is to draw, and the threshold of the confidence."""
        shown: list[Column] = []

        def photos(title: str, view: str) -> None:
            if view in step.views:
                shown.append(Column(
                    title, self._photos(model, step.views[view].images),
                    smooth=True))

        def labels(title: str, maps: Tensor | None) -> None:
            if maps is not None:
                shown.append(Column(title, [
                    colorize(one, palette) for one in self._cpu(maps)]))

        photos(self.source, self.source)
        if self.source in step.views:
            labels(f'{self.source} label', step.views[self.source].labels)
        photos(self.target, self.target)
        threshold = None
        pseudo = step.pseudo_labels.get(self.pseudo_label)
        if pseudo is not None:
            policy = model.pseudo_labels[self.pseudo_label]
            threshold = getattr(policy, 'threshold', None)
            labels('pseudo-label', pseudo.labels)
            shown.append(Column('confidence', [
                heat(one, threshold)
                for one in self._cpu(pseudo.confidence.float())]))
        photos(self.mixed, self.mixed)
        if self.mixed in step.views:
            labels(f'{self.mixed} label', step.views[self.mixed].labels)
        seen = self.mixed if self.mixed in step.students else self.source
        if seen in step.students:
            labels(f'prediction on {seen}',
                   self._prediction(model, step, seen))
        # all columns get as many rows as the shortest
        rows = min((len(column.tiles) for column in shown), default=0)
        for column in shown:
            column.tiles = column.tiles[:rows]
        return (shown if rows else []), threshold

    def _cpu(self, batch: Tensor) -> np.ndarray:
        return batch[:self.max_samples].detach().cpu().numpy()

    def _photos(self, model: UDASegmentor, images: Tensor) -> list[np.ndarray]:
        base = model.data_preprocessor.base
        mean = std = None
        if getattr(base, '_enable_normalize', False):
            mean = base.mean.flatten().cpu().numpy()
            std = base.std.flatten().cpu().numpy()
        photos = denormalize(self._cpu(images.float()), mean, std)
        # the first name is onedl's, the second one that of mmseg 1.2
        if not getattr(base, '_channel_conversion',
                       getattr(base, 'channel_conversion', True)):
            photos = photos[..., ::-1]  # as loaded, BGR
        return [np.ascontiguousarray(photo) for photo in photos]

    def _prediction(self, model: UDASegmentor, step: Step,
                    view: str) -> Tensor | None:
        logits = step.students[view].logits
        if logits is None:
            return None
        logits = F.interpolate(
            logits[:self.max_samples].float(),
            step.views[view].images.shape[-2:], mode='bilinear',
            align_corners=model.align_corners)
        if logits.shape[1] > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > 0.5).long()
