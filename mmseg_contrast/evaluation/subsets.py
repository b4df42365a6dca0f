"""Means over some of the classes, as papers report them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

ClassSubset = str | Sequence[str | int]

# The classes of Cityscapes that SYNTHIA labels: all but terrain, truck and
# train. Older papers leave out wall, fence and pole too.
SYNTHIA_16 = ('road', 'sidewalk', 'building', 'wall', 'fence', 'pole',
              'traffic light', 'traffic sign', 'vegetation', 'sky', 'person',
              'rider', 'car', 'bus', 'motorcycle', 'bicycle')
SYNTHIA_13 = tuple(
    name for name in SYNTHIA_16 if name not in ('wall', 'fence', 'pole'))
READY_MADE = dict(synthia16=SYNTHIA_16, synthia13=SYNTHIA_13)

KEY = 'FieldIoUMetric.class_subsets'
TAKEN = ('aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall')


def read_subsets(
        subsets: Mapping[str, ClassSubset] | None
) -> dict[str, tuple[str | int, ...]]:
    """Check what can be checked without the dataset's classes.

    Args:
        subsets (Mapping, optional): Of every result's name, the classes:
            a key of ``READY_MADE``, or names and ids.

    Returns:
        dict[str, tuple[str | int, ...]]: Of every result's name, class names
            and ids.

    Raises:
        ValueError: If a result's name is taken, a ready-made subset is
            unknown or a subset is empty.
    """
    if subsets is None:
        return {}
    if not isinstance(subsets, Mapping):
        raise ValueError(
            f'{KEY} must be a dict of names and classes, such as '
            f"dict(mIoU16='synthia16'), not {subsets!r}.")
    return {name: _members(name, classes)
            for name, classes in subsets.items()}


def _members(name: str, classes: ClassSubset) -> tuple[str | int, ...]:
    if name in TAKEN or name.startswith('IoU.'):
        raise ValueError(
            f'{KEY}: {name!r} is already the name of another result; choose '
            "one such as 'mIoU16'.")
    if isinstance(classes, str):
        if classes not in READY_MADE:
            raise ValueError(
                f'{KEY}.{name}: there is no subset {classes!r}'
                f'{_hint(classes, READY_MADE)}; give one of '
                f'{", ".join(READY_MADE)}, or a list of class names or ids.')
        return READY_MADE[classes]
    if not isinstance(classes, Sequence) or not classes:
        raise ValueError(
            f'{KEY}.{name} must be a list with at least one class, not '
            f'{classes!r}.')
    return tuple(classes)


def class_ids(name: str, members: Sequence[str | int],
              classes: Sequence[str]) -> list[int]:
    """Find the classes of a subset in a dataset.

    Args:
        name (str): Name of the result.
        members (Sequence[str | int]): Class names and ids.
        classes (Sequence[str]): Names of the dataset's classes.

    Returns:
        list[int]: Ids from 0 to ``len(classes) - 1``, each once.

    Raises:
        ValueError: If the dataset lacks a class or one is named twice.
    """
    ids: list[int] = []
    for member in members:
        if isinstance(member, str):
            if member not in classes:
                raise ValueError(
                    f'{KEY}.{name}: the dataset has no class {member!r}'
                    f'{_hint(member, classes)}; its classes are '
                    f'{", ".join(classes)}.')
            index = list(classes).index(member)
        else:
            index = member
            if not 0 <= index < len(classes):
                raise ValueError(
                    f'{KEY}.{name}: there is no class {index}; the ids of '
                    f"the dataset's classes are 0 to {len(classes) - 1}.")
        if index in ids:
            raise ValueError(
                f'{KEY}.{name} has the class {classes[index]!r} twice.')
        ids.append(index)
    return ids


def _hint(word: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f', did you mean {close[0]!r}?' if close else ''
