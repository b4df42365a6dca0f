"""A config's model that trains on one random batch, without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_contrast.adaptation import UDASegmentor
from mmseg_contrast.datasets import PackStreamInputs
from mmseg_contrast.engine.hooks import CompileHook

from .draws import blocks, generator

Size = tuple[int, int]
#: Keys of transforms that say how large an image is afterwards, and whether
#: the width comes first.
SIZES = dict(crop_size=False, scale=True, size=True)
#: So small that the weights stay what they are.
RATE = 1e-9


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Args:
        config (str): File of the config.
        options (dict): Of ``--cfg-options``.
        crop (tuple[int, int], optional): Height and width of the source's
            images; other sizes in pixels change by the same factor. None:
            those of the config.
        batch (int, optional): Images of each stream; None: the config's.
        device (str): 'cpu' or 'cuda'.
        amp (str): 'float32', or the type of mixed precision.
        compiled (bool): Whether torch compiles what is measured.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    crop: Size | None = None
    batch: int | None = None
    device: str = 'cpu'
    amp: str = 'float32'
    compiled: bool = False

    def read(self) -> Config:
        """The config, with the options asked for.

        Raises:
            SystemExit: If there is no such file, or it trains in another
                way.
        """
        if not Path(self.config).is_file():
            raise SystemExit(f'--config {self.config}: there is no such file.')
        config = Config.fromfile(self.config)
        config.merge_from_dict(self.options)
        loader = config.get('train_dataloader') or {}
        if config.get('model', {}).get('type') != 'UDASegmentor' or (
                'streams' not in loader.get('dataset', {})):
            raise SystemExit(
                f'--config {self.config}: a step is that of a UDASegmentor '
                'with a train_dataloader of named streams.')
        return config


def stream_sizes(config: Config) -> dict[str, Size]:
    """Height and width of each stream's images, by its pipeline.

    Raises:
        SystemExit: If a pipeline does not say.
    """
    sizes = {}
    for name, stream in config.train_dataloader.dataset.streams.items():
        found = None
        for step in _pipeline(stream):
            for key, wide_first in SIZES.items():
                value = step.get(key)
                if isinstance(value, int):
                    value = (value, value)
                if isinstance(value, Sequence) and len(value) == 2 and all(
                        isinstance(one, int) for one in value):
                    found = tuple(value[::-1] if wide_first else value)
        if found is None:
            raise SystemExit(
                f'the pipeline of the stream {name!r} says no size: add a '
                'RandomCrop with a crop_size.')
        sizes[name] = found
    return sizes


def _pipeline(stream: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first dataset's; wrappers of datasets may have one of their own."""
    dataset = stream.get('dataset') or stream['datasets'][0]
    found: list[Mapping[str, Any]] = []
    while dataset is not None:
        found = [*dataset.get('pipeline', []), *found]
        inner = dataset.get('dataset') or (dataset.get('datasets') or [None])
        dataset = inner[0] if isinstance(inner, list) else inner
    return found


def rescale(config: Config, sizes: dict[str, Size], crop: Size
            ) -> dict[str, Size]:
    """Other crops: all sizes in pixels, of streams and model, change alike.

    Args:
        config (Config): Its model is changed in place.
        sizes (dict): Of the streams' images.
        crop (tuple[int, int]): New height and width of the source's images,
            or of the first stream's where none is named so.

    Returns:
        dict: New sizes of the streams' images.
    """
    before = sizes.get('source', next(iter(sizes.values())))

    def scaled(value: Any) -> Any:
        if isinstance(value, int):
            return max(1, round(value * crop[0] / before[0]))
        return tuple(max(1, round(one * new / old)) for one, new, old in zip(
            value, crop, before, strict=True))

    student = config.model.segmentor
    places = [(part.get('data_preprocessor'), 'size')
              for part in (config, config.model, student)]
    places.append((student, 'detail_size'))
    for view in config.model.get('views', {}).values():
        places += [(view, 'size'), (view, 'block')]
    # All are computed before one is set: parts may be the same object.
    changes = [(part, key, scaled(part[key])) for part, key in places
               if part is not None and part.get(key) is not None]
    for part, key, value in changes:
        part[key] = value
    return {name: scaled(size) for name, size in sizes.items()}


def without_files(value: Any) -> Any:
    """A config without the files that weights come from."""
    def named(one: Any) -> bool:
        return isinstance(one, Mapping) and one.get('type') == 'Pretrained'

    if isinstance(value, Mapping):
        return {key: without_files(one) for key, one in value.items()
                if key != 'pretrained' and not named(one)}
    if isinstance(value, (list, tuple)):
        return type(value)(
            without_files(one) for one in value if not named(one))
    return value


def random_batch(loader: Mapping[str, Any], sizes: dict[str, Size],
                 batch: int, classes: int) -> dict[str, Any]:
    """What the loader would give, of random images and labels in blocks.

    Args:
        loader (Mapping): ``train_dataloader`` of a config.
        sizes (dict): Height and width of each stream's images.
        batch (int): Positions; a stream may have several images at each.
        classes (int): Of the labels.
    """
    draw = generator()
    data: dict[str, Any] = dict(inputs={}, data_samples={})
    for name, stream in loader['dataset']['streams'].items():
        packed = [_sample(name, stream, sizes[name], max(classes, 2), draw)
                  for _ in range(batch * stream.get('ratio', 1))]
        for key in data:
            data[key][name] = [one[key] for one in packed]
    return data


def _sample(name: str, stream: Mapping[str, Any], size: Size, classes: int,
            draw: torch.Generator) -> dict[str, Any]:
    """One image, packed as at the end of a pipeline."""
    image = torch.randint(
        0, 256, (*size, 3), generator=draw, dtype=torch.uint8).numpy()
    results: dict[str, Any] = dict(
        img=image, img_path='none', ori_shape=size, img_shape=size,
        pad_shape=size, scale_factor=(1., 1.), flip=False,
        flip_direction=None, reduce_zero_label=False, seg_fields=[])

    def labels() -> np.ndarray:
        side = max(1, min(size) // 16)
        return blocks(classes, size, draw, side).to(torch.uint8).numpy()

    if stream.get('labelled', True):
        results.update(gt_seg_map=labels(), seg_fields=['gt_seg_map'])
    if stream.get('pseudo_labels') is not None:
        results['pseudo_label'] = labels()
    if any(step.get('type') == 'MarkValidRegion'
           for step in _pipeline(stream)):
        results['valid_region'] = np.ones(size, np.uint8)
    packed = PackStreamInputs().transform(results)
    packed['data_samples'].set_metainfo(dict(domain=name))
    return packed


def optim_config(config: ConfigDict, amp: str) -> dict[str, Any]:
    """The optimizer wrapper's, in the precision asked for.

    Args:
        config (ConfigDict): ``optim_wrapper`` of a config.
        amp (str): 'float32', 'bfloat16' or 'float16'.
    """
    plain = {key: value for key, value in config.items()
             if key not in ('dtype', 'loss_scale', 'use_fp64')}
    if amp == 'float32':
        return dict(plain, type='OptimWrapper')
    # Only half precision is so narrow that losses must be scaled.
    scale: Any = 'dynamic' if amp == 'float16' else dict(enabled=False)
    return dict(plain, type='AmpOptimWrapper', dtype=amp, loss_scale=scale)


class Training:
    """A model in the middle of its training, and what it trains with.

    Args:
        setup (Setup): What is trained.

    Raises:
        SystemExit: See :meth:`Setup.read`.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.read()
        init_default_scope(config.get('default_scope', 'mmseg'))
        torch.backends.cudnn.benchmark = bool(
            config.get('env_cfg', {}).get('cudnn_benchmark', False))
        torch.manual_seed(0)
        self.sizes = stream_sizes(config)
        if setup.crop is not None:
            self.sizes = rescale(config, self.sizes, setup.crop)
        model = ConfigDict(without_files(config.model))
        model.setdefault('data_preprocessor', config.get('data_preprocessor'))
        self.model: UDASegmentor = MODELS.build(model)
        for name, objective in self.model.objectives.items():
            if hasattr(objective, 'freeze'):
                objective.freeze(MODELS.build(
                    model.objectives[name].get('encoder')
                    or model.segmentor.backbone))
        self.model.init_weights()
        self.model.to(setup.device).train()
        # What has a schedule has begun.
        self.max_iters = config.get('train_cfg', {}).get('max_iters')
        self.model.clock.load_state_dict(dict(
            count=torch.tensor((self.max_iters or 0) // 2)))
        self.optim_wrapper = build_optim_wrapper(
            self.model, optim_config(config.optim_wrapper, setup.amp))
        for group in self.optim_wrapper.optimizer.param_groups:
            group['lr'] = RATE
        self.batch = random_batch(
            config.train_dataloader, self.sizes,
            setup.batch or config.train_dataloader.batch_size,
            self.model.num_classes)
        self.runner = SimpleNamespace(model=self.model)  # what a hook needs
        self.compile_hook: CompileHook | None = None
        if setup.compiled:
            options = dict(config.get('default_hooks', {}).get('compile', {}))
            options.pop('type', None)
            self.compile_hook = CompileHook(**options)
            self.compile_hook.before_train(self.runner)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [one for group in self.optim_wrapper.optimizer.param_groups
                for one in group['params']]

    @property
    def images(self) -> int:
        """Images of a step, of all streams."""
        return sum(len(one) for one in self.batch['inputs'].values())

    @contextmanager
    def running(self) -> Iterator[None]:
        """As within a run of mmengine: parts may ask how long it is."""
        hub = MessageHub.get_current_instance()
        before = hub.get_info('max_iters', None)
        hub.update_info('max_iters', self.max_iters)
        try:
            yield
        finally:
            hub.update_info('max_iters', before)

    def step(self) -> None:
        """One iteration."""
        if self.compile_hook is not None:
            self.compile_hook.before_train_iter(self.runner, 0)
        self.model.train_step(self.batch, self.optim_wrapper)

    def losses(self) -> None:
        """The forward of one iteration."""
        with self.optim_wrapper.optim_context(self.model):
            data = self.model.data_preprocessor(self.batch, True)
            self.model(**data, mode='loss')
