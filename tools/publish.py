"""Write the student (or a teacher) alone, for its plain stock config.

    python tools/publish.py work_dirs/dacs/iter_4000.pth
    python tools/publish.py iter_4000.pth published/segformer.pth \
        --teacher ema --fp16

A checkpoint of a UDASegmentor stores the student under its plain names
(``backbone.*``) and everything else under reserved roots; see
``mmseg_contrast.adaptation.state_dict``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / 'mmseg_contrast').is_dir():  # a clone uses its own code
    sys.path.insert(0, str(ROOT))

from mmseg_contrast.environment import allow_checkpoint_classes  # noqa: E402, I001
from mmseg_contrast.files import written_whole  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Write the student of a checkpoint alone.')
    parser.add_argument('checkpoint', help='checkpoint of a training run')
    parser.add_argument(
        'out',
        nargs='?',
        help='a folder, or a file NAME.pth that becomes NAME-<hash>.pth '
        '(default: beside the checkpoint)')
    parser.add_argument(
        '--teacher', help='write the teacher of this name, not the student')
    parser.add_argument(
        '--fp16', action='store_true', help='store floats in half precision')
    return parser.parse_args()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint safely.

    Args:
        path (Path): The file.

    Returns:
        dict: What mmengine saved.

    Raises:
        ValueError: If there is no such file, or it is no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f'There is no checkpoint {path}.')
    # Loading through the fork of mmengine takes some classes off the list.
    allow_checkpoint_classes()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
            KeyError) as error:
        raise ValueError(
            f'{path} is no checkpoint that torch can load safely '
            f'({str(error).splitlines()[0]}).') from error
    if (not isinstance(checkpoint, Mapping)
            or not isinstance(checkpoint.get('state_dict'), Mapping)):
        raise ValueError(
            f'{path} is no checkpoint of MMEngine: it has no state_dict.')
    return dict(checkpoint)


def student_state(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The student's entries: all outside of the reserved roots.

    Args:
        state (Mapping): State dict of a UDASegmentor or a plain model.

    Returns:
        OrderedDict: State dict of the plain model.
    """
    from mmseg_contrast.adaptation import RESERVED_ROOTS

    kept = OrderedDict(
        (key, value) for key, value in state.items()
        if key.split('.')[0] not in RESERVED_ROOTS
        and not _is_counter(key, value))
    metadata = getattr(state, '_metadata', None)
    if metadata is not None:
        kept._metadata = OrderedDict(  # type: ignore[attr-defined]
            (key, value) for key, value in metadata.items()
            if key.split('.')[0] not in RESERVED_ROOTS)
    return kept


def teacher_state(state: Mapping[str, Tensor],
                  name: str) -> OrderedDict[str, Tensor]:
    """The entries of one teacher, under the student's names.

    Args:
        state (Mapping): State dict of a UDASegmentor.
        name (str): Name of the teacher, such as ``ema``.

    Returns:
        OrderedDict: State dict of the plain model.

    Raises:
        ValueError: If there is no teacher of that name with weights.
    """
    names = sorted({
        parts[1]
        for parts in (key.split('.') for key in state)
        if parts[0] == 'teachers' and len(parts) > 3 and parts[2] == 'model'
    })
    if name not in names:
        raise ValueError(
            f'The checkpoint has no teacher --teacher {name}; it has '
            f'{", ".join(names) if names else "none"}.')
    prefix = f'teachers.{name}.model.'
    kept = OrderedDict((key[len(prefix):], value)
                       for key, value in state.items()
                       if key.startswith(prefix))
    metadata = getattr(state, '_metadata', None)
    if metadata is not None:
        # The teacher's own root is 'teachers.ema.model', without a dot.
        kept._metadata = OrderedDict(  # type: ignore[attr-defined]
            (key[len(prefix):], value) for key, value in metadata.items()
            if f'{key}.'.startswith(prefix))
    return kept


def to_half(state: OrderedDict[str, Tensor]) -> None:
    """Cast float tensors to half precision, in place; counts stay."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            state[key] = value.half()


def plain(value: Any) -> Any:
    """Builtin types only, so that every torch loads the file safely."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def write(published: dict[str, Any], folder: Path, stem: str) -> Path:
    """Write a checkpoint under a name that holds the hash of its bytes.

    The file appears at once or not at all.

    Args:
        published (dict): What to save.
        folder (Path): Where to; created if needed.
        stem (str): Name without hash and ending.

    Returns:
        Path: ``<folder>/<stem>-<8 hex digits>.pth``.
    """
    # torch writes the file's name into the file: a buffer has none, so equal
    # weights get an equal hash.
    buffer = io.BytesIO()
    torch.save(published, buffer)
    data = buffer.getvalue()
    path = folder / f'{stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth'

    with written_whole(path) as file:
        file.write(data)
    return path


def publish(source: Path, out: Path | None, teacher: str | None,
            fp16: bool) -> Path:
    """Write one model of a checkpoint alone.

    Args:
        source (Path): Checkpoint of a training run.
        out (Path, optional): Folder, or file whose stem is used.
        teacher (str, optional): Name of a teacher; default the student.
        fp16 (bool): Store floats in half precision.

    Returns:
        Path: The written file.

    Raises:
        ValueError: If the checkpoint isn't one, or lacks that teacher.
    """
    checkpoint = read_checkpoint(source)
    state = checkpoint['state_dict']
    weights = (
        student_state(state) if teacher is None else teacher_state(
            state, teacher))
    if not weights:
        raise ValueError(f'{source} holds no weights of a student.')
    if fp16:
        to_half(weights)

    stem = source.stem if teacher is None else f'{source.stem}_{teacher}'
    folder = source.parent
    if out is not None and out.suffix == '.pth' and not out.is_dir():
        folder, stem = out.parent, out.stem
    elif out is not None:
        folder = out
    return write(
        dict(meta=plain(checkpoint.get('meta', {})), state_dict=weights),
        folder, stem)


def _is_counter(key: str, value: Any) -> bool:
    """Whether an entry is a count of the whole model's, not a weight."""
    return '.' not in key and isinstance(value, Tensor) and value.ndim == 0


def main() -> None:
    """Publish what the command line asks for."""
    args = parse_args()
    out = None if args.out is None else Path(args.out)
    try:
        path = publish(
            Path(args.checkpoint), out, teacher=args.teacher, fp16=args.fp16)
    except ValueError as error:
        sys.exit(f'publish: {error}')
    sys.stdout.write(f'{path}\n')


if __name__ == '__main__':
    main()
