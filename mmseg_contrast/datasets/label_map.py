"""One set of classes for a stream, whatever its datasets call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mmengine.logging import print_log

IGNORED = 255


class LabelMap:
    """Maps the classes of a dataset to those of the run, by name.

    Several classes may become one. A name that both sides know maps to
    itself; each other one needs an entry.

    Args:
        classes (sequence[str]): The classes of the run, in order of id.
        mapping (dict[str, str or None], optional): Own name -> name of the
            run; None ignores the class (id 255).
        palette (sequence, optional): RGB colour of every class of the run.
            None takes the dataset's own where the names are equal.
        ignore (sequence[str]): More own names to ignore, the same as a
            mapping to None.

    Raises:
        ValueError: If a target of the mapping is no class of the run, or the
            palette has another length.
    """

    def __init__(self,
                 classes: Sequence[str],
                 mapping: Mapping[str, str | None] | None = None,
                 palette: Sequence[Sequence[int]] | None = None,
                 ignore: Sequence[str] = ()) -> None:
        self.classes = tuple(classes)
        self.mapping = dict(mapping or {})
        self.mapping.update(dict.fromkeys(ignore))
        self.palette = None if palette is None else [list(c) for c in palette]
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(
                'label_map.classes must name every class of the run once, but '
                f'is {list(self.classes)}')
        unknown = sorted({
            t for t in self.mapping.values()
            if t is not None and t not in self.classes
        })
        if unknown:
            raise ValueError(
                f'label_map.mapping leads to {unknown}, which label_map.'
                f'classes {list(self.classes)} does not contain')
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise ValueError(
                f'label_map.palette has {len(self.palette)} colours for '
                f'{len(self.classes)} classes')

    def target(self, name: str) -> str | None:
        """Where a class of the dataset goes.

        Args:
            name (str): Own name of the class.

        Returns:
            str or None: Name in the run; None if it is ignored.

        Raises:
            KeyError: If nothing is said about this class.
        """
        if name in self.mapping:
            return self.mapping[name]
        if name in self.classes:
            return name
        raise KeyError(name)

    def table(self, names: Sequence[str], where: str) -> np.ndarray:
        """New id of every id of a dataset.

        Args:
            names (sequence[str]): The dataset's own classes.
            where (str): Config key of the dataset or stream, for messages.

        Returns:
            np.ndarray: int16 ``(256,)``; 255 is ignored, -1 must not occur.

        Raises:
            ValueError: If some classes have no target; lists them.
        """
        missing = [n for n in names
                   if n not in self.mapping and n not in self.classes]
        if missing:
            raise ValueError(
                f'`{where}`: {missing} have no counterpart in '
                f'{list(self.classes)}: add them to `{where}.'
                'label_map.mapping`, with None for those to ignore')
        table = identity_table(len(names))
        for i, name in enumerate(names):
            target = self.target(name)
            table[i] = (IGNORED if target is None
                        else self.classes.index(target))
        return table

    def check_keys(self, names: Sequence[str], where: str) -> None:
        """Refuse entries for classes that no dataset of the stream has.

        Args:
            names (sequence[str]): The classes of all its datasets.
            where (str): Config key of the dataset or stream, for messages.

        Raises:
            ValueError: If the mapping has such an entry.
        """
        unknown = sorted(set(self.mapping) - set(names))
        if unknown:
            raise ValueError(
                f'`{where}.label_map.mapping` names {unknown}, but its '
                f'classes are {list(names)}')

    def colours(self, names: Sequence[str],
                palette: Sequence[Sequence[int]]) -> list[list[int]]:
        """The palette of the run's classes.

        Args:
            names (sequence[str]): The dataset's own classes.
            palette (sequence): Their colours.

        Returns:
            list[list[int]]: RGB; the given palette, or else that of the
                first own class which becomes the class, or else a grey.
        """
        if self.palette is not None:
            return self.palette
        found: dict[str, list[int]] = {}
        for equal in (True, False):
            for name, colour in zip(names, palette, strict=False):
                target = self.target(name)
                if target is not None and (name == target or not equal):
                    found.setdefault(target, list(colour))
        step = 255 // (len(self.classes) + 1)
        return [
            found.get(c, [step * (i + 1)] * 3)
            for i, c in enumerate(self.classes)
        ]

    def describe(self, names: Sequence[str], where: str) -> str:
        """What goes where, as a small table.

        Args:
            names (sequence[str]): The dataset's own classes.
            where (str): Config key of the dataset or stream.

        Returns:
            str: One line for every class of the run, one for the ignored.
        """
        sources: dict[str | None, list[str]] = {}
        for name in names:
            sources.setdefault(self.target(name), []).append(name)
        width = max(len(c) for c in self.classes)
        lines = [f'label map of {where} (own classes -> class):']
        for i, name in enumerate(self.classes):
            own = ', '.join(sources.get(name, ['-']))
            lines.append(f'  {i:3d} {name:<{width}} <- {own}')
        if None in sources:
            lines.append(f'  ignored: {", ".join(sources[None])}')
        absent = self.absent(names)
        if absent:
            lines.append(
                f'  classes without a source: {", ".join(absent)} (`pseudo_'
                'labels.<name>.absent_classes` can mask them in the '
                "teacher's argmax)")
        return '\n'.join(lines)

    def absent(self, names: Sequence[str]) -> list[str]:
        """Classes of the run that the dataset cannot give.

        Args:
            names (sequence[str]): The dataset's own classes.

        Returns:
            list[str]: Their names, in order of id.
        """
        given = {self.target(n) for n in names}
        return [c for c in self.classes if c not in given]

    def log(self, names: Sequence[str], where: str) -> None:
        """Print the table once, to the current log.

        Args:
            names (sequence[str]): The dataset's own classes.
            where (str): Config key of the dataset or stream.
        """
        print_log(self.describe(names, where), logger='current')


def identity_table(num_classes: int, ignore_index: int = IGNORED
                   ) -> np.ndarray:
    """The table of a dataset that needs no map.

    Args:
        num_classes (int): Number of classes, at most 255.
        ignore_index (int): Another id that the dataset ignores.

    Returns:
        np.ndarray: int16 ``(256,)``: classes and 255 stay, the dataset's
            ignore id becomes 255, all others are -1.
    """
    table = np.full(256, -1, dtype=np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[IGNORED] = IGNORED
    if num_classes <= ignore_index < IGNORED:
        table[ignore_index] = IGNORED
    return table
