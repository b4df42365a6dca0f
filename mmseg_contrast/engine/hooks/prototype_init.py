"""Fills banks from the source before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.utils import ProgressBar
from mmseg.registry import HOOKS
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...contrast import Bank
from ...datasets import StreamDataset
from ...datasets.seeding import guarded_random_state, seed_everything
from ...models import ContrastHead
from ...ops import generator_at
from ..looking import chosen_heads, glance, student_of, untouched, unwrapped
from .uda_visualization import class_colors

_NAME = 'PrototypeInitHook'


class LabelledPass(Dataset):
    """The labelled images of a training set, one after the other.

    Draws are those of the training pipeline, made of ``(seed, number)``
    alone. A stream is walked through as in its first epoch (with rare-class
    sampling: as many draws as it has images).

    Args:
        dataset (Dataset): A StreamDataset, or any of mmseg's.
        stream (str): Which stream, of a StreamDataset.
        numbers (Sequence[int]): Which samples.

    Raises:
        ValueError: If the stream is unknown or has no labels.
    """

    def __init__(self, dataset: Any, stream: str, numbers: Sequence[int]
                 ) -> None:
        self.dataset = dataset
        self.numbers = numbers
        self.stream = None
        if isinstance(dataset, StreamDataset):
            self.stream = labelled_stream(dataset, stream)

    def __len__(self) -> int:
        """Samples of this rank."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, packed."""
        number = self.numbers[index]
        with guarded_random_state():
            if self.stream is not None:
                ratio = self.stream.ratio
                return self.stream.draw(
                    self.dataset.seed, number // ratio, number % ratio)
            seed_everything(0, _NAME, number)
            return self.dataset[number]


def labelled_stream(dataset: StreamDataset, name: str) -> Any:
    """A stream by name.

    Args:
        dataset (StreamDataset): The streams.
        name (str): Which.

    Returns:
        Stream: It has labels.

    Raises:
        ValueError: If it is unknown or has no labels.
    """
    dataset.full_init()
    if name not in dataset.streams or not dataset.streams[name].labelled:
        labelled = [key for key, one in dataset.streams.items()
                    if one.labelled]
        raise ValueError(
            f'{_NAME}.view = {name!r} in custom_hooks is no labelled stream '
            f'of train_dataloader.dataset.streams; these are {labelled}.')
    return dataset.streams[name]


@HOOKS.register_module()
class PrototypeInitHook(Hook):
    """Fills the banks of ContrastHeads from a pass over the source.

    Else the first anchors meet a bank that knows a few classes from a few
    images. The pass is made before training, with the model as initialised
    or loaded, in evaluation mode; no statistics, no random state and no
    draw of the training change. A bank with a clock takes the mean over the
    whole pass, whatever its clock is in training; a queue keeps the last
    vectors. Several ranks share the images.

    A resumed run has its banks and skips this; so does a bank that is not
    empty since a checkpoint brought it, and one that has nothing to fill.

    Args:
        head (str, optional): Which ContrastHead, such as 'aux' or 'aux_0'.
            None: all.
        view (str): Labelled stream; not used with a dataset that has none.
        max_samples (int, optional): Images at most, of all ranks together.
        use (str): Whose embeddings: 'student', or 'teacher'. A teacher
            begins as a copy of the student, so it differs only if a
            checkpoint was loaded.
        teacher (str): Name in ``model.teachers``.
        correct_only (bool): Only pixels that the net has right count, as in
            SPCL and SDCA (with a net that was trained on the source).
        batch_size (int, optional): Images of a rank at a time. None: as in
            training.
        num_workers (int, optional): Processes that read. None: as in
            training.

    Raises:
        ValueError: If an argument is out of range.
    """

    # After PositionHook, which hands the run's seed to the dataset.
    priority = 'BELOW_NORMAL'

    def __init__(self,
                 head: str | None = None,
                 view: str = 'source',
                 max_samples: int | None = None,
                 use: str = 'student',
                 teacher: str = 'ema',
                 correct_only: bool = False,
                 batch_size: int | None = None,
                 num_workers: int | None = None) -> None:
        if use not in ('student', 'teacher'):
            raise ValueError(f"{_NAME}.use in custom_hooks must be 'student' "
                             f"or 'teacher', got {use!r}.")
        for key, value, least in (('max_samples', max_samples, 1),
                                  ('batch_size', batch_size, 1),
                                  ('num_workers', num_workers, 0)):
            if value is not None and value < least:
                raise ValueError(f'{_NAME}.{key} in custom_hooks must be >= '
                                 f'{least}, got {value}.')
        self.head = head
        self.view = view
        self.max_samples = max_samples
        self.use = use
        self.teacher = teacher
        self.correct_only = correct_only
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._loaded = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember that the teacher has weights of its own."""
        self._loaded = True

    def before_train(self, runner: Runner) -> None:
        """Fill what is empty.

        Raises:
            ValueError: If head, stream or teacher are unknown.
        """
        heads = chosen_heads(
            runner.model, None if self.head is None else [self.head], _NAME)
        net = self._net(runner)
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, StreamDataset):
            labelled_stream(dataset, self.view)  # name mistakes at any time
        if runner.iter > 0:
            print_log(f'{_NAME}: skipped, the run resumes at iteration '
                      f'{runner.iter} with its banks', logger='current')
            return
        empty = {name: head for name, head in heads.items()
                 if self._is_empty(name, head)}
        if empty:
            self._fill(runner, net, empty)

    def _net(self, runner: Runner) -> nn.Module:
        """The segmentor whose embeddings are taken."""
        if self.use == 'student':
            return student_of(runner.model)
        teachers = getattr(unwrapped(runner.model), 'teachers', {})
        if self.teacher not in teachers:
            raise ValueError(
                f'{_NAME}.teacher = {self.teacher!r} in custom_hooks is not '
                f'in model.teachers, which has {sorted(teachers)}.')
        if self._loaded:
            return teachers[self.teacher].model
        print_log(f'{_NAME}: no checkpoint was loaded, so the teacher will '
                  "begin as a copy of the student: the student's embeddings "
                  'are taken', logger='current')
        return student_of(runner.model)

    def _is_empty(self, name: str, head: ContrastHead) -> bool:
        """Whether there is something to fill; else say why not."""
        kind = type(head.bank).__name__
        if not head.bank.remembers:
            print_log(f'{_NAME}: skipped {name}, a {kind} takes in no '
                      'vectors', logger='current')
            return False
        held = int(head.bank.centres()[1].sum())
        if held:
            print_log(f'{_NAME}: skipped {name}, its {kind} came with the '
                      f'checkpoint and holds {held} of {head.num_classes} '
                      'classes', logger='current')
        return not held

    def _fill(self, runner: Runner, net: nn.Module,
              heads: dict[str, ContrastHead]) -> None:
        """Pass over the images."""
        loader, total, padding = self._loader(runner)
        rank, world = get_dist_info()
        decode = self.correct_only or any(
            head.features != 'backbone' for head in heads.values())
        projecting = {name: chosen_heads(net, [name], _NAME)[name]
                      for name in heads}
        preprocess = unwrapped(runner.model).data_preprocessor
        print_log(f'{_NAME}: {total} images for {", ".join(heads)}',
                  logger='current')
        bar = ProgressBar(total) if is_main_process() and total else None
        # The student's mode matters for its own banks, the net's for the pass.
        with untouched(runner.model, _NAME), _whole_pass(
                [head.bank for head in heads.values()]):
            for number, batch in enumerate(loader):
                data = preprocess(self._as_streams(runner, batch), True)
                inputs, samples = data['inputs'], data['data_samples']
                if isinstance(inputs, dict):
                    inputs, samples = inputs[self.view], samples[self.view]
                labels = torch.cat(
                    [one.gt_sem_seg.data for one in samples]).long()
                seen = glance(net, inputs, decode)
                if padding and number == len(loader) - 1:
                    labels = labels.clone()
                    labels[-padding:] = -1
                for name, head in heads.items():
                    head.update_bank(
                        head.pixels(
                            seen.embed(projecting[name]), labels,
                            seen.probabilities, self.correct_only),
                        generator_at(
                            runner.seed or 0, rank, number, _NAME, name))
                if bar is not None:
                    step = min(len(labels) * world, total - bar.completed)
                    if step:
                        bar.update(step)
        if bar is not None:
            bar.file.write('\n')
        self._tell(runner, heads)

    def _loader(self, runner: Runner) -> tuple[DataLoader, int, int]:
        """This rank's part, the number of all images, and what is padding.

        All ranks have as many batches of the same size, since a bank's
        update is one of all of them. The last sample of a rank may be a
        repeated one, whose labels are then ignored.
        """
        train = runner.train_dataloader
        dataset = train.dataset
        total = len(LabelledPass(dataset, self.view, ())
                    .stream or dataset)
        if self.max_samples is not None:
            total = min(total, self.max_samples)
        rank, world = get_dist_info()
        mine = range(rank, -(-total // world) * world, world)
        padding = sum(number >= total for number in mine)
        numbers = [number % total for number in mine]
        workers = self.num_workers
        if workers is None:
            workers = train.num_workers
        return DataLoader(
            LabelledPass(dataset, self.view, numbers),
            batch_size=self.batch_size or train.batch_size or 1,
            num_workers=min(workers, len(numbers)),
            collate_fn=pseudo_collate,
            # or it would draw from the default one
            generator=torch.Generator()), total, padding

    def _as_streams(self, runner: Runner, batch: dict) -> dict:
        """As the model's preprocessor gets it in training."""
        if not isinstance(runner.train_dataloader.dataset, StreamDataset):
            return batch
        return {key: {self.view: value} for key, value in batch.items()}

    def _tell(self, runner: Runner, heads: dict[str, ContrastHead]) -> None:
        for name, head in heads.items():
            classes, _ = class_colors(runner, head.num_classes)
            held = head.bank.centres()[1].tolist()
            missing = [str(one) for one, there in zip(
                classes, held, strict=False) if not there]
            print_log(
                f'{_NAME}: the bank of {name} holds {sum(held)} of '
                f'{len(held)} classes'
                + (f', not {", ".join(missing)}' if missing else ''),
                logger='current')


@contextmanager
def _whole_pass(banks: Sequence[Bank]) -> Iterator[None]:
    """Banks with a clock average over all that comes; ages begin after it."""
    clocked = [bank for bank in banks if hasattr(bank, 'clock')]
    clocks = [bank.clock for bank in clocked]
    for bank in clocked:
        bank.clock = 'cumulative'
    try:
        yield
    finally:
        for bank, clock in zip(clocked, clocks, strict=True):
            bank.clock = clock
        for bank in banks:
            bank.age.clamp_(max=0)  # -1 is a class that is not there
