"""The sampler of streams: it yields positions, not indices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized

from mmengine.dist import get_dist_info, sync_random_seed
from mmseg.registry import DATA_SAMPLERS
from torch.utils.data import Sampler


@DATA_SAMPLERS.register_module()
class PositionSampler(Sampler):
    """Yields ``rank, rank + world, rank + 2 * world, ...`` for ever.

    All draws are made by :class:`StreamDataset` from ``(seed, position)``,
    so going on after ``n`` samples is arithmetic and reads no data.

    Args:
        dataset (Sized): The dataset; its ``set_seed`` is called when it has
            one.
        seed (int, optional): Seed of the dataset's draws, equal on all
            ranks. None draws one and shares it.
    """

    def __init__(self, dataset: Sized, seed: int | None = None) -> None:
        self.dataset = dataset
        self.rank, self.world_size = get_dist_info()
        self.start = 0
        self.set_seed(sync_random_seed() if seed is None else seed)

    def set_seed(self, seed: int) -> None:
        """Change the seed of the dataset's draws.

        Args:
            seed (int): The seed, equal on all ranks.
        """
        self.seed = int(seed)
        if hasattr(self.dataset, 'set_seed'):
            self.dataset.set_seed(self.seed)

    def skip(self, num_samples: int) -> None:
        """Let the next iteration start after ``num_samples`` of this rank.

        Args:
            num_samples (int): Samples of this rank already consumed since
                the very beginning; absolute, so calling it twice is safe.

        Raises:
            ValueError: If it is negative.
        """
        if num_samples < 0:
            raise ValueError(
                f'num_samples must not be negative, but is {num_samples}')
        self.start = int(num_samples)

    def __iter__(self) -> Iterator[int]:
        """Positions of this rank, without end."""
        first = self.start * self.world_size + self.rank
        return itertools.count(first, self.world_size)

    def __len__(self) -> int:
        """Length of the dataset: that of its first stream."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: positions know no epochs.

        Args:
            epoch (int): Ignored.
        """
