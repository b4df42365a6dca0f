"""Rare-class sampling: draw a class first, then an image that shows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .class_stats import class_statistics
from .reader import Reader

_NO_CLASS = -1


def rare_class_probabilities(pixels: np.ndarray, temperature: float
                             ) -> np.ndarray:
    r"""How often each class is drawn.

    .. math:: P(c) = softmax_c((1 - f_c) / T), f_c = pixels_c / sum(pixels)

    over the classes that occur; one without a pixel has probability 0.

    Args:
        pixels (np.ndarray): Pixels per class in all images, ``(C,)``.
        temperature (float): T; infinity makes all classes equal.

    Returns:
        np.ndarray: Probabilities, float64 ``(C,)``.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    energy = (1 - pixels / pixels.sum()) / temperature
    energy = np.where(pixels > 0, energy, -np.inf)
    weights = np.exp(energy - energy.max())
    return weights / weights.sum()


class RareClassDraw:
    r"""Draws ``(item, class)`` pairs (DAFormer, Hoyer et al., CVPR 2022).

    A class is drawn by :func:`rare_class_probabilities`, then uniformly one
    of the images with more than ``min_pixels`` pixels of it.

    With ``max_repeats_per_file=r``, no image is drawn more than ``r`` times
    as often as under uniform sampling: of the joint probabilities
    :math:`P(c, i)`, those of an image with :math:`p_i = \sum_c P(c, i) >
    r / n` are scaled to a sum of ``r / n``; the probability so freed goes to
    all images in proportion to their room :math:`r / n - p_i`, as draws
    without a class (and without its condition on the crop). ``r = 1`` is
    uniform sampling, None sets no limit.

    Args:
        counts (np.ndarray): Pixels per image and class, ``(n, C)``.
        sizes (np.ndarray): Pixels per image, ``(n,)``.
        classes (sequence[str]): Names of the classes.
        stream (str): Name of the stream, for messages.
        temperature (float): Smaller favours rare classes more.
        min_pixels (int or float): Pixels of the class an image needs more
            than; a float in (0, 1) is a fraction of the image's pixels.
        min_crop_ratio (float): The crop needs more than ``min_pixels *
            min_crop_ratio`` pixels of the class (of its own pixels, if a
            fraction).
        max_recrops (int): How often the crop is drawn again for that.
        max_repeats_per_file (float, optional): ``r`` above, at least 1.

    Raises:
        ValueError: If an option is out of range, or a class that occurs has
            no image with enough pixels.
    """

    OPTIONS = ('temperature', 'min_pixels', 'min_crop_ratio', 'max_recrops',
               'max_repeats_per_file', 'stats_file')

    def __init__(self,
                 counts: np.ndarray,
                 sizes: np.ndarray,
                 classes: Sequence[str],
                 stream: str,
                 temperature: float = 0.01,
                 min_pixels: int | float = 3000,
                 min_crop_ratio: float = 0.5,
                 max_recrops: int = 10,
                 max_repeats_per_file: float | None = None) -> None:
        self.stream = stream
        self.min_pixels = min_pixels
        self.min_crop_ratio = min_crop_ratio
        self.max_recrops = max_recrops
        self._check(temperature, max_repeats_per_file)
        counts = np.asarray(counts)
        if counts.sum() == 0:
            raise ValueError(
                f'stream {stream!r}: no pixel of any class in its labels, so '
                f'`streams.{stream}.rare_class` has nothing to draw')
        self.class_probabilities = rare_class_probabilities(
            counts.sum(axis=0), temperature)
        self._list_pairs(counts, np.asarray(sizes), classes)
        if max_repeats_per_file is not None:
            self._limit(len(counts), max_repeats_per_file)
        self._cumulated = np.cumsum(self.probabilities)
        self._cumulated /= self._cumulated[-1]

    @classmethod
    def from_readers(cls,
                     readers: Sequence[Reader],
                     items: np.ndarray,
                     classes: Sequence[str],
                     stream: str,
                     temperature: float = 0.01,
                     min_pixels: int | float = 3000,
                     min_crop_ratio: float = 0.5,
                     max_recrops: int = 10,
                     max_repeats_per_file: float | None = None,
                     stats_file: str | None = None) -> RareClassDraw:
        """Build it from the datasets of a stream.

        Args:
            readers (sequence[Reader]): Readers of its datasets.
            items (np.ndarray): Reader and index of every item, ``(n, 2)``.
            classes (sequence[str]): Names of the classes.
            stream (str): Name of the stream.
            temperature (float): See the class.
            min_pixels (int or float): See the class.
            min_crop_ratio (float): See the class.
            max_recrops (int): See the class.
            max_repeats_per_file (float, optional): See the class.
            stats_file (str, optional): Where the class statistics are kept,
                see :func:`class_statistics`.

        Returns:
            RareClassDraw: The draw over the items.
        """
        # a dataset that is repeated is counted once
        pairs, inverse = np.unique(items, axis=0, return_inverse=True)
        counts, sizes = class_statistics(
            readers, pairs, classes, stream, stats_file=stats_file)
        inverse = inverse.reshape(-1)
        return cls(
            counts[inverse],
            sizes[inverse],
            classes,
            stream,
            temperature=temperature,
            min_pixels=min_pixels,
            min_crop_ratio=min_crop_ratio,
            max_recrops=max_recrops,
            max_repeats_per_file=max_repeats_per_file)

    def draw(self) -> tuple[int, int | None]:
        """Draw from numpy's global generator.

        Returns:
            tuple: Item, and the class its crop must show (None: no class).
        """
        point = np.random.random_sample()
        pair = int(np.searchsorted(self._cumulated, point, side='right'))
        label = int(self.pairs[pair, 1])
        return int(self.pairs[pair, 0]), (
            None if label == _NO_CLASS else label)

    def accepts(self, labels: Tensor, label: int) -> bool:
        """Whether a crop shows enough of a class.

        Args:
            labels (Tensor): Label map of the crop, any shape.
            label (int): The class.

        Returns:
            bool: True if it has more than the wanted pixels.
        """
        wanted = self.min_pixels * self.min_crop_ratio
        if 0 < self.min_pixels < 1:
            wanted *= labels.numel()
        return int((labels == label).sum()) > wanted

    def _check(self, temperature: float, repeats: float | None) -> None:
        where = f'`streams.{self.stream}.rare_class'
        if not temperature > 0:
            raise ValueError(f'{where}.temperature` must be positive, but is '
                             f'{temperature}')
        if self.min_pixels < 0 or (isinstance(self.min_pixels, float)
                                   and self.min_pixels >= 1
                                   and not self.min_pixels.is_integer()):
            raise ValueError(
                f'{where}.min_pixels` must be a number of pixels or a '
                f'fraction in (0, 1), but is {self.min_pixels}')
        if self.min_crop_ratio < 0:
            raise ValueError(f'{where}.min_crop_ratio` must not be negative, '
                             f'but is {self.min_crop_ratio}')
        if not isinstance(self.max_recrops, int) or self.max_recrops < 0:
            raise ValueError(f'{where}.max_recrops` must be a whole number '
                             f'from 0 on, but is {self.max_recrops!r}')
        if repeats is not None and repeats < 1:
            raise ValueError(
                f'{where}.max_repeats_per_file` must be at least 1 (uniform '
                f'sampling) or None, but is {repeats}')

    def _list_pairs(self, counts: np.ndarray, sizes: np.ndarray,
                    classes: Sequence[str]) -> None:
        """All pairs (item, class) and their joint probabilities."""
        needed = (self.min_pixels * sizes if 0 < self.min_pixels < 1 else
                  np.full(len(sizes), self.min_pixels))
        pairs, probabilities = [], []
        for label in np.flatnonzero(counts.sum(axis=0)):
            usable = np.flatnonzero(counts[:, label] > needed)
            if len(usable) == 0:
                self._refuse(counts[:, label], sizes, classes[int(label)])
            pairs.append(
                np.stack([usable, np.full(len(usable), label)], axis=1))
            probabilities.append(
                np.full(len(usable),
                        self.class_probabilities[label] / len(usable)))
        self.pairs = np.concatenate(pairs)
        self.probabilities = np.concatenate(probabilities)

    def _refuse(self, counts: np.ndarray, sizes: np.ndarray, name: str
                ) -> None:
        if 0 < self.min_pixels < 1:
            found = f'{(counts / sizes).max():.3g} of an image'
        else:
            found = f'{int(counts.max())} pixels'
        raise ValueError(
            f'stream {self.stream!r}: no image has more than '
            f'{self.min_pixels} of the class {name!r}, the most is {found}: '
            f'lower `streams.{self.stream}.rare_class.min_pixels`')

    def _limit(self, num_items: int, repeats: float) -> None:
        """Scale down items above the limit and spread what this frees."""
        limit = repeats / num_items
        items = self.pairs[:, 0]
        totals = np.bincount(items, self.probabilities, num_items)
        scale = np.minimum(1, limit / np.maximum(totals, limit))
        self.probabilities = self.probabilities * scale[items]
        room = np.maximum(limit - np.minimum(totals, limit), 0)
        freed = 1 - self.probabilities.sum()
        if freed <= 1e-12 or room.sum() <= 0:
            return
        extra = np.flatnonzero(room)
        self.pairs = np.concatenate([
            self.pairs,
            np.stack([extra, np.full(len(extra), _NO_CLASS)], axis=1)
        ])
        self.probabilities = np.concatenate(
            [self.probabilities, freed * room[extra] / room.sum()])


def item_probabilities(draw: RareClassDraw, num_items: int) -> np.ndarray:
    """How often each item is drawn, all classes together.

    Args:
        draw (RareClassDraw): The draw.
        num_items (int): Number of items.

    Returns:
        np.ndarray: Probabilities, ``(num_items,)``.
    """
    return np.bincount(draw.pairs[:, 0], draw.probabilities, num_items)
