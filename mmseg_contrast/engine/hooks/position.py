"""Lets a resumed run go on at the very next sample."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.registry import HOOKS
from torch import nn
from torch.utils.data import DataLoader

from ...datasets import PositionSampler, StreamDataset
from ...models.clock import Clock
from ..distributed import refuse_other_wrappers
from ..loader import PositionedIterator
from ..optimizer import refuse_layer_decay_on_wrapper


def check_classes(dataset: StreamDataset, model: nn.Module) -> None:
    """Model and data must have the same number of classes.

    Args:
        dataset (StreamDataset): The streams.
        model (nn.Module): The model, unwrapped.

    Raises:
        ValueError: If they differ.
    """
    classes = dataset.metainfo.get('classes')
    number = getattr(model, 'num_classes', None)
    if classes is None or number is None or len(classes) == number:
        return
    raise ValueError(
        f'model.segmentor.decode_head.num_classes = {number}, but the '
        f'classes of train_dataloader.dataset.streams are {len(classes)}: '
        f'{", ".join(classes)}.')


def restart_clocks(model: nn.Module) -> None:
    """Set all step counts of a model to 0.

    Args:
        model (nn.Module): The model, unwrapped.
    """
    for part in model.modules():
        if isinstance(part, Clock):
            part.reset()


@HOOKS.register_module()
class PositionHook(Hook):
    """Sets the train loader to the position of the run.

    A resumed run starts at iteration ``i``, so its next sample is number
    ``i * batch_size`` of this rank. mmengine gets there by loading and
    throwing away all samples before (0.10.7) or by skipping in the sampler,
    unless told otherwise (the onedl fork). This hook moves the sampler, and
    no skipped sample is loaded on either. It also hands a seed that came
    from the checkpoint to the dataset.

    A worker process that dies is replaced, and the run goes on with the same
    samples (:class:`.loader.PositionedIterator`).

    A run that starts at iteration 0 from another run's weights
    (``load_from``) starts its step counts at 0 too.

    Runs in ``before_train``, when checkpoint and loop are ready. Loaders of
    other datasets are left alone.
    """

    priority = 'NORMAL'

    def before_train(self, runner: Runner) -> None:
        """Move the loader.

        Args:
            runner (Runner): The runner, its checkpoint loaded.

        Raises:
            ValueError: If streams are combined with another sampler or
                another train loop, or a wrapped student with a stock
                layer-decay constructor, or if the model is in a wrapper
                other than DDP, or has another number of classes than the
                data.
        """
        refuse_other_wrappers(runner.model)
        refuse_layer_decay_on_wrapper(runner.cfg, runner.model)
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if runner.iter == 0:
            restart_clocks(model)
        loop = runner.train_loop
        loader = runner.train_dataloader
        if not isinstance(loader.dataset, StreamDataset):
            return
        sampler = _sampler(loader)
        if not isinstance(sampler, PositionSampler):
            raise ValueError(
                'StreamDataset is drawn by position: set `train_dataloader.'
                "sampler` to dict(type='PositionSampler'), it is "
                f'{type(sampler).__name__}')
        if not isinstance(loop, IterBasedTrainLoop):
            raise ValueError(
                'StreamDataset has no epochs: set `train_cfg` to dict(type='
                f"'IterBasedTrainLoop', ...), it is {type(loop).__name__}")
        check_classes(loader.dataset, model)
        seed = _seed(runner)
        new_seed = seed is not None and seed != sampler.seed
        if seed is not None and new_seed:
            sampler.set_seed(seed)
        # A checkpoint brings rank 0's seed to all of them.
        runner.message_hub.update_info('seed', runner.seed)
        loop.dataloader_iterator = PositionedIterator(
            loader,
            loop.dataloader_iterator,
            sampler,
            samples=lambda: runner.iter * _batch_size(loader),
            resumed=runner.iter > 0 or new_seed,
            # stock mmengine calls next() this often to skip samples
            ignored=0 if hasattr(loop.dataloader_iterator, 'skip_iter')
            else runner.iter)


def _sampler(loader: DataLoader) -> Any:
    """The sampler of samples, also below a custom batch sampler."""
    if loader.batch_size is None:
        return getattr(loader.batch_sampler, 'sampler', loader.sampler)
    return loader.sampler


def _batch_size(loader: DataLoader) -> int:
    if loader.batch_size is not None:
        return loader.batch_size
    return loader.batch_sampler.batch_size


def _seed(runner: Runner) -> int | None:
    """The seed that all ranks share; None if the config pins another."""
    config = runner.cfg.get('train_dataloader') or {}
    sampler = config.get('sampler') if hasattr(config, 'get') else None
    if isinstance(sampler, dict) and sampler.get('seed') is not None:
        return None
    if runner.seed is None:
        return None
    different = runner._randomness_cfg.get('diff_rank_seed', False)
    return runner.seed - get_rank() if different else runner.seed
