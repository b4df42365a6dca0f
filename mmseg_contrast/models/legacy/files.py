"""Read files of the old stack safely, write new ones whole or not at all."""

from __future__ import annotations

import re
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...environment import allow_checkpoint_classes
from ...files import written_whole

#: What mmcv 1.x and timm put beside the weights, and what is read instead:
#: containers without behaviour. A config dict is read as an ordered one,
#: which is the only kind that torch fills from a pickle with attributes.
_CONTAINERS = (
    (OrderedDict, 'mmcv.utils.config.ConfigDict'),
    (OrderedDict, 'addict.addict.Dict'),
    (Namespace, 'argparse.Namespace'),
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the weights of a checkpoint, without running code from it.

    Args:
        path (Path): Any format of ``torch.save`` since torch 0.2: a dict with
            ``state_dict`` (mmcv) or ``model`` (timm), or the weights alone. A
            prefix ``module.`` that all of them have is taken off.

    Returns:
        tuple[dict[str, Tensor], dict]: Weights by name, and ``meta``, empty
        if there is none.

    Raises:
        ValueError: If there is no such file, or no weights can be read.
    """
    if not path.is_file():
        raise ValueError(f'There is no checkpoint {path}.')
    _refuse_archive(path)
    try:
        with _old_classes():
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=True)
    # A damaged pickle can fail with anything.
    except Exception as error:
        raise ValueError(_why_unreadable(path, error)) from error
    weights: Any = checkpoint
    meta: Any = None
    if isinstance(checkpoint, Mapping):
        meta = checkpoint.get('meta')
        for key in ('state_dict', 'model'):
            if isinstance(checkpoint.get(key), Mapping):
                weights = checkpoint[key]
                break
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f'{path} holds no weights.')
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f'{path} holds no weights: {key!r} is of the type '
                f'{type(value).__name__}.')
    wrapped = all(key.startswith('module.') for key in weights)
    return ({key.removeprefix('module.') if wrapped else key: value.detach()
             for key, value in weights.items()},
            dict(meta) if isinstance(meta, Mapping) else {})


def check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse to overwrite, before any work is done.

    Args:
        target (Path): What is to be written.
        source (Path): What is read.
        force (bool): Whether an existing file may be replaced.

    Raises:
        ValueError: If it exists and may not be, is a folder or the source.
    """
    if target.is_dir():
        raise ValueError(f'{target} is a folder: name a file in it.')
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target} is what is to be converted: give the '
                         'result another name.')
    if target.exists() and not force:
        raise ValueError(f'{target} exists: give --force to replace it.')


def write_weights(target: Path, weights: Mapping[str, Tensor],
                  meta: Mapping[str, Any]) -> None:
    """Write a checkpoint that appears at once or not at all.

    Args:
        target (Path): The file; its folder is made if needed.
        weights (Mapping[str, Tensor]): By name.
        meta (Mapping): Builtin types only, so that every torch loads it.
    """
    with written_whole(target) as file:
        torch.save(
            dict(meta=dict(meta), state_dict=OrderedDict(weights)), file)


@contextmanager
def _old_classes() -> Iterator[None]:
    """Allow the containers of old files while one is read."""
    # numpy's scalars and arrays; as loading through mmengine may take them
    # off the list again.
    allow_checkpoint_classes()
    if not hasattr(torch.serialization, 'safe_globals'):  # before torch 2.5
        yield
        return
    # Leaving torch's own context would also forget what was there before.
    before = torch.serialization.get_safe_globals()
    named = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 6)
    torch.serialization.add_safe_globals(
        [*_CONTAINERS] if named else [Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refuse_archive(path: Path) -> None:
    """Downloads come packed, and torch's zip files are zip files too."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith('/data.pkl') for name in names):
            return
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as packed:
            names = packed.getnames()
        if {'storages', 'tensors', 'pickle'} <= set(names):
            raise ValueError(
                f'{path} is in the format of torch 0.1, which torch does not '
                f'read safely. {_rescue(path)}')
    else:
        return
    inside = [name for name in names if name.endswith(('.pth', '.pt'))]
    raise ValueError(
        f'{path} is an archive: unpack it and name the checkpoint in it'
        f'{" (" + ", ".join(inside) + ")" if inside else ""}.')


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    found = re.search(r'GLOBAL ([\w.]+)', text)
    if found:
        return (f'{path} contains {found[1]}, which torch does not read '
                f'safely. {_rescue(path)}')
    first = next(iter(text.strip().splitlines()), type(error).__name__)
    return f'{path} is no checkpoint that torch can load safely ({first}).'


def _rescue(path: Path) -> str:
    return ('If you trust it, write its weights alone: torch.save(torch.load('
            f'{path.name!r}, weights_only=False)["state_dict"], '
            f'"weights_of_{path.name}").')
