"""One model of a published checkpoint, fitted to a model of mmseg 1.x."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .mit import convert_mit, is_published_mit

#: Where the models of DAFormer, HRDA, MIC and SePiCo lie in their files.
#: The first prefix that is there counts; a prefix is never looked for in the
#: middle of a name: 'model.' is also the end of 'ema_model.'.
PARTS = {
    'student': ('model.',),
    'teacher': ('ema_model.', 'mic.teacher.ema_model.'),
    'imnet': ('imnet_model.',),
}
_ROOTS = tuple(prefix for prefixes in PARTS.values() for prefix in prefixes)
#: Roots of a plain segmentor, the student of a file without prefixes.
_PLAIN = ('backbone.', 'decode_head.')


@dataclass(frozen=True)
class Converted:
    """Weights under new names.

    Attributes:
        weights (dict[str, Tensor]): By new name.
        sources (dict[str, tuple[str, ...]]): Old names by new name.
        published_mit (bool): Whether the backbone is SegFormer's release.
    """

    weights: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    published_mit: bool


@dataclass(frozen=True)
class Fit:
    """How weights fit a model.

    Attributes:
        placed (dict[str, Tensor]): In the model's order.
        unplaced (tuple[str, ...]): Old names that the model has no place for.
        missing (tuple[str, ...]): The model's names that nothing fills.
        wrong_shape (dict): The model's name: shapes in file and model.
    """

    placed: dict[str, Tensor]
    unplaced: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def check(self, source: str, model: str) -> None:
        """Refuse what would not load strictly.

        Args:
            source (str): The file, for the message.
            model (str): The model or its config, for the message.

        Raises:
            ValueError: Names each key that is missing or has another shape.
        """
        faults = []
        if self.missing:
            faults.append('\n  '.join([
                f'lacks {len(self.missing)} key(s) of {model}:',
                *self.missing]))
        if self.wrong_shape:
            faults.append('\n  '.join([
                f'has {len(self.wrong_shape)} tensor(s) of another shape than '
                f'{model}:', *(f'{key}: {mine} in the file, {its} in the model'
                               for key, (mine, its)
                               in self.wrong_shape.items())]))
            if all('conv_seg' in key for key in self.wrong_shape):
                faults.append('may have other classes: see '
                              'decode_head.num_classes.')
        if faults:
            raise ValueError('\n'.join(f'{source} {one}' for one in faults))


def take_part(weights: Mapping[str, Tensor],
              part: str) -> tuple[dict[str, Tensor], str]:
    """Take one model out of a checkpoint.

    Args:
        weights (Mapping[str, Tensor]): All weights of a file.
        part (str): A key of ``PARTS``. The student of a file without any of
            the prefixes is all of it.

    Returns:
        tuple[dict[str, Tensor], str]: Weights without their prefix, and the
        prefix.

    Raises:
        ValueError: If there is no such part.
    """
    for prefix in PARTS[part]:
        taken = {key[len(prefix):]: value for key, value in weights.items()
                 if key.startswith(prefix)}
        if taken:
            return taken, prefix
    if part == 'student' and any(key.startswith(_PLAIN) for key in weights):
        return {key: value for key, value in weights.items()
                if not key.startswith(_ROOTS)}, ''
    roots = Counter(_root(key) for key in weights)
    raise ValueError(
        f'it has no {part} ({" or ".join(PARTS[part])}); its keys begin with '
        + ', '.join(f'{root} ({count})' for root, count in roots.items())
        + '.')


def convert_student(weights: Mapping[str, Tensor]) -> Converted:
    """Give a segmentor of the published code its names in mmseg 1.x.

    Only the Mix Transformer is called otherwise. Heads and ResNets have kept
    their names, and this package's heads have the published ones.

    Args:
        weights (Mapping[str, Tensor]): By name, without a prefix.

    Returns:
        Converted: All of them.

    Raises:
        ValueError: If the backbone's attention is incomplete.
    """
    root = 'backbone.'
    backbone = convert_backbone({
        key[len(root):]: value for key, value in weights.items()
        if key.startswith(root)})
    renamed = {root + key: value for key, value in backbone.weights.items()}
    sources = {root + key: tuple(root + one for one in keys)
               for key, keys in backbone.sources.items()}
    for key, value in weights.items():
        if not key.startswith(root):
            renamed[key], sources[key] = value, (key,)
    return Converted(renamed, sources, backbone.published_mit)


def convert_backbone(weights: Mapping[str, Tensor]) -> Converted:
    """The same for a backbone alone, without ``backbone.``.

    Args:
        weights (Mapping[str, Tensor]): By name.

    Returns:
        Converted: All of them; names of a backbone that is no Mix Transformer
        of SegFormer's release are kept.

    Raises:
        ValueError: If the backbone's attention is incomplete.
    """
    if not is_published_mit(weights):
        return Converted(dict(weights), {key: (key,) for key in weights},
                         published_mit=False)
    converted = convert_mit(weights)
    return Converted(
        {key: value for key, (value, _) in converted.items()},
        {key: keys for key, (_, keys) in converted.items()},
        published_mit=True)


def fit(converted: Converted, model: Mapping[str, Tensor]) -> Fit:
    """Compare names and shapes with those of a model.

    Args:
        converted (Converted): Weights.
        model (Mapping[str, Tensor]): State dict of the model.

    Returns:
        Fit: ``check`` raises unless the weights load strictly.
    """
    weights = converted.weights
    wrong = {
        key: (tuple(weights[key].shape), tuple(value.shape))
        for key, value in model.items()
        if key in weights and weights[key].shape != value.shape}
    return Fit(
        placed={key: weights[key] for key in model
                if key in weights and key not in wrong},
        unplaced=tuple(one for key, keys in converted.sources.items()
                       if key not in model for one in keys),
        missing=tuple(key for key in model if key not in weights),
        wrong_shape=wrong)


def table(weights: Iterable[str], prefix: str,
          unplaced: Iterable[str]) -> str:
    """What of a file is not in the result, by prefix.

    Args:
        weights (Iterable[str]): All names of the file.
        prefix (str): Of the part that was taken.
        unplaced (Iterable[str]): Names of that part, without the prefix,
            that have no place.

    Returns:
        str: Lines of a table, with the names of that part that have no
        place one by one, or one line that says that there is nothing.
    """
    rows: Counter[tuple[str, str]] = Counter()
    for key in weights:
        root = _root(key)
        # A plain student is everything that is no other part.
        if key.startswith(prefix) and (prefix or f'{root}.' not in _ROOTS):
            continue
        if prefix.startswith(f'{root}.'):
            rows[_first(key, root, 1), 'not the backbone'] += 1
        else:
            rows[root, _which(root)] += 1
    unplaced = list(unplaced)
    for key in unplaced:
        rows[_first(prefix + key, prefix, 2), 'the model has no such key'] += 1
    if not rows:
        return 'All keys of the file are placed.'
    width = max(len(name) for name, _ in rows)
    lines = ['Not placed:', f'  {"prefix":{width}}  keys  why']
    lines += [f'  {name:{width}}  {count:4d}  {why}'
              for (name, why), count in rows.items()]
    if unplaced:
        lines += ['Names that the model has not:',
                  *(f'  {prefix}{key}' for key in unplaced)]
    return '\n'.join(lines)


def _root(key: str) -> str:
    """The known prefix of a name without its dot, else its first part."""
    for prefix in _ROOTS:
        if key.startswith(prefix):
            return prefix[:-1]
    return key.split('.')[0]


def _first(key: str, prefix: str, count: int) -> str:
    """The prefix and that many parts of a name after it."""
    rest = key[len(prefix):].lstrip('.')
    return (f'{prefix.rstrip(".")}.' if prefix else '') + '.'.join(
        rest.split('.')[:count])


def _which(root: str) -> str:
    for part, prefixes in PARTS.items():
        if f'{root}.' in prefixes:
            return f'another model (--part {part})'
    return 'no part of a model'
