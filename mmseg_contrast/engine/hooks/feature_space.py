"""Pictures of the embeddings of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS
from torch import Tensor, nn

from ...adaptation.step import Step
from ...models import ContrastHead
from ...ops import labels_at, position_seed
from ..feature_plot import METHODS, Cloud, balanced_pixels, draw_features
from ..looking import (
    bank_centres,
    contrast_heads,
    glance,
    student_of,
    untouched,
    unwrapped,
)
from .uda_visualization import class_colors

BACKBONE = 'backbone'
_NAME = 'FeatureSpaceHook'


@dataclass
class Batch:
    """Images to be embedded.

    Args:
        name (str): Of the view.
        images (Tensor): Normalised, ``(N, 3, H, W)``.
        labels (Tensor, optional): int64, ``(N, H, W)``; None: what the net
            predicts.
        origin (str): Where the labels come from.
        valid (Tensor, optional): Pixels that may be drawn, ``(N, H, W)``.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    origin: str = 'predicted'
    valid: Tensor | None = None


def find_head(model: nn.Module, name: str | None, where: str
              ) -> tuple[str, ContrastHead | None]:
    """The head whose embeddings are drawn.

    Args:
        model (nn.Module): Any model.
        name (str, optional): Of a ContrastHead, or 'backbone'. None: the
            first ContrastHead, and the backbone if there is none.
        where (str): Who asks, for the message.

    Returns:
        tuple: Name and head; None for the backbone.

    Raises:
        ValueError: If there is no such head.
    """
    found = contrast_heads(student_of(model))
    if name is None:
        name = next(iter(found), BACKBONE)
    if name != BACKBONE and name not in found:
        raise ValueError(
            f'{where} = {name!r} is no ContrastHead of the model, which has '
            f"{sorted(found)}; {BACKBONE!r} are the backbone's features.")
    return name, found.get(name)


def embed(net: nn.Module, head: ContrastHead | None, batch: Batch,
          number: int, num_classes: int, seed: int) -> Cloud:
    """Embeddings of some pixels of a batch; inside ``untouched``.

    Args:
        net (nn.Module): The segmentor.
        head (ContrastHead, optional): One of its heads. None: the last of
            the features that its decode head gets.
        batch (Batch): Images.
        number (int): Pixels at most, drawn evenly over classes.
        num_classes (int): Number of classes.
        seed (int): Of the draw.

    Returns:
        Cloud: On the host.
    """
    seen = glance(net, batch.images, batch.labels is None or (
        head is not None and head.features != BACKBONE))
    labels = batch.labels
    if labels is None:
        assert seen.probabilities is not None
        labels = seen.probabilities.argmax(1)
    if batch.valid is not None:
        labels = labels.where(batch.valid, -1)
    if head is None:
        maps = seen.features[-1]
        labels = labels_at(labels, maps.shape[2:], 'nearest', num_classes)
    else:
        maps = seen.embed(head)
        labels = head.pixels(maps, labels).labels
    ids = labels.flatten().cpu().numpy()
    chosen = balanced_pixels(ids, number, num_classes, seed)
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    vectors = rows[torch.from_numpy(chosen).to(rows.device)]
    return Cloud(f'{batch.name} ({batch.origin})',
                 vectors.float().cpu().numpy(), ids[chosen])


def draw(net: nn.Module, head: ContrastHead | None, bank: ContrastHead | None,
         batches: Sequence[Batch], pixels: int, classes: Sequence[str],
         palette: np.ndarray, method: str, title: str, seed: int
         ) -> np.ndarray | None:
    """One picture of all batches.

    Args:
        net (nn.Module): The segmentor.
        head (ContrastHead, optional): Its head that embeds, or None for the
            backbone.
        bank (ContrastHead, optional): The head that has the prototypes (a
            teacher's copy has none).
        batches (Sequence[Batch]): What is drawn, one panel for all of a
            name.
        pixels (int): Of all batches together, at most.
        classes (Sequence[str]): Names of the classes.
        palette (np.ndarray): uint8 RGB, ``(C, 3)``.
        method (str): 'pca' or 'tsne'.
        title (str): On top.
        seed (int): Of the draw of pixels.

    Returns:
        np.ndarray, optional: uint8 RGB, ``(h, w, 3)``; None if no pixel has
        a label.
    """
    names = list(dict.fromkeys(batch.name for batch in batches))
    number = pixels // len(names)
    with untouched(net, _NAME, seed):
        clouds = [
            _together([embed(net, head, batch, number, len(classes),
                             position_seed(seed, name, at))
                       for at, batch in enumerate(batches)
                       if batch.name == name], number, len(classes))
            for name in names]
        memory = None if bank is None else bank_centres(bank)
    clouds = [cloud for cloud in clouds if len(cloud.labels)]
    if not clouds:
        return None
    prototypes = np.zeros((0, clouds[0].vectors.shape[1]), np.float32)
    held = np.zeros(0, np.int64)
    if memory is not None:
        held = memory[1].cpu().numpy().nonzero()[0]
        prototypes = memory[0].cpu().numpy()[held]
    return draw_features(
        clouds, prototypes, held, classes, palette, method, title)


def _together(clouds: Sequence[Cloud], number: int, num_classes: int
              ) -> Cloud:
    """Some pixels of several clouds, evenly over classes."""
    vectors = np.concatenate([cloud.vectors for cloud in clouds])
    labels = np.concatenate([cloud.labels for cloud in clouds])
    chosen = balanced_pixels(labels, number, num_classes, 0)
    return Cloud(clouds[0].title, vectors[chosen], labels[chosen])


def write_png(image: np.ndarray, path: Path) -> None:
    """Write a picture; folders are made.

    Args:
        image (np.ndarray): uint8 RGB, ``(h, w, 3)``.
        path (Path): The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # bytes by Python, since OpenCV can't write to all paths everywhere
    _, png = cv2.imencode('.png', cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


@HOOKS.register_module()
class FeatureSpaceHook(Hook):
    """Draws embeddings of pixels by class and view, with the prototypes.

    The pixels are of the batch of the iteration, seen by the student in
    evaluation mode. Colours are labels, of a view without labels its
    pseudo-labels, else what the student predicts. Pictures go to
    ``<work_dir>/<out_dir>/iter_<n>.png`` and to the visualizer's backends
    as ``feature_space``. Nothing is done in other iterations.

    Args:
        interval (int): Iterations between pictures.
        head (str, optional): Name of a ContrastHead, or 'backbone' for what
            the decode head gets (its last map). None: the first
            ContrastHead, and 'backbone' if there is none.
        views (Sequence[str]): Of a UDASegmentor, one panel each; what an
            iteration doesn't have is left out.
        pixels (int): Of all views together, evenly over classes.
        method (str): 'pca', or 'tsne', which takes about 25 s for 2,000
            pixels and 5 s for 1,000.
        out_dir (str): Folder below the work dir.
        first (bool): Whether the first iteration is drawn as well.

    Raises:
        ValueError: If an argument is out of range.
    """

    # After hooks of normal priority, which change what is drawn.
    priority = 'BELOW_NORMAL'

    def __init__(self,
                 interval: int = 1000,
                 head: str | None = None,
                 views: Sequence[str] = ('source', 'target'),
                 pixels: int = 2000,
                 method: str = 'pca',
                 out_dir: str = 'feature_space',
                 first: bool = False) -> None:
        where = 'in custom_hooks'
        if method not in METHODS:
            raise ValueError(f'{_NAME}.method {where} must be one of '
                             f'{METHODS}, got {method!r}.')
        if isinstance(views, str) or not views:
            raise ValueError(f'{_NAME}.views {where} must be a list of '
                             f'views, got {views!r}.')
        for name, value, least in (('interval', interval, 1),
                                   ('pixels', pixels, len(views))):
            if value < least:
                raise ValueError(f'{_NAME}.{name} {where} must be >= '
                                 f'{least}, got {value}.')
        self.interval = interval
        self.head = head
        self.views = tuple(views)
        self.pixels = pixels
        self.method = method
        self.out_dir = out_dir
        self.first = first

    def before_train(self, runner: Runner) -> None:
        """Find the head before training starts.

        Raises:
            ValueError: If there is no such head.
        """
        find_head(runner.model, self.head, f'{_NAME}.head in custom_hooks')

    def _due(self, runner: Runner) -> bool:
        number = runner.iter + 1
        return is_main_process() and (number % self.interval == 0
                                      or self.first and number == 1)

    # See UDAVisualizationHook for how hooks share the step.

    def before_train_iter(self, runner: Runner, batch_idx: int,
                          data_batch: dict | None = None) -> None:
        """Ask for the step of this iteration, where there are steps."""
        model = unwrapped(runner.model)
        if not hasattr(model, 'keep_step'):
            return
        model.last_step = None
        if self._due(runner):
            model.keep_step = True

    @torch.no_grad()
    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        """Draw."""
        model = unwrapped(runner.model)
        steps = hasattr(model, 'keep_step')
        if steps:
            model.keep_step = False
        if not self._due(runner):
            return
        if steps:
            step = model.last_step
            batches = [] if step is None else [
                step_batch(step, view) for view in self.views
                if view in step.views]
        else:
            with untouched(model, _NAME):
                batches = [plain_batch(model, data_batch)]
        if not batches:
            return
        name, head = find_head(model, self.head, _NAME)
        net, number = student_of(model), runner.iter + 1
        classes, palette = class_colors(runner, net.num_classes)
        image = draw(
            net, head, head, batches, self.pixels, classes, palette,
            self.method, f'features of {name}, iteration {number}', number)
        if image is None:
            return
        write_png(image, Path(
            runner.work_dir, self.out_dir, f'iter_{number:06d}.png'))
        runner.visualizer.add_image('feature_space', image, step=number)


def step_batch(step: Step, name: str) -> Batch:
    """A view of a step, with the labels that the student learns from.

    Args:
        step (Step): The iteration.
        name (str): One of its views.
    """
    view = step.views[name]
    if view.labels is not None:
        labels = view.labels
        if view.weights is not None:
            labels = labels.where(view.weights > 0, -1)
        return Batch(name, view.images, labels, 'labels')
    for pseudo in step.pseudo_labels.values():
        if pseudo.view == name:
            # Their weight may be 0 for the whole batch: not asked here.
            return Batch(name, view.images, pseudo.labels, 'pseudo-labels',
                         view.valid)
    return Batch(name, view.images, valid=view.valid)


def plain_batch(model: nn.Module, data: dict | None) -> Batch:
    """A batch of a segmentor without views.

    Args:
        model (nn.Module): The model.
        data (dict): As the loader gave it.
    """
    assert data is not None
    done = model.data_preprocessor(data, True)
    return Batch('train', done['inputs'], torch.cat(
        [one.gt_sem_seg.data for one in done['data_samples']]).long(),
        'labels')
