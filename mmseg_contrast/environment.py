"""What must be there before anything of this package can be imported.

OpenMMLab exists twice: as the stock releases (mmengine, mmcv, mmsegmentation)
and as maintained forks with the same import names (onedl-mmengine, ...). A
package cannot depend on "one or the other", so it is checked here, once.
"""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stdout
from importlib import import_module, metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

#: Import name -> distributions that provide it; the first is for messages.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}

#: Imported in this order, so that the first failure is the root of the rest.
MODULES = ('torch', 'mmengine', 'mmcv', 'mmseg', 'mmseg.models',
           'mmseg.datasets')

#: The functions that a pickled HistoryBuffer refers to.
HISTORY_METHODS = ('min', 'max', 'current', 'mean')


def check_environment() -> None:
    """Import the OpenMMLab stack, or say in one sentence what to install.

    Raises:
        ImportError: If a part is missing, doesn't import, or is installed
            twice (the fork and the stock release overwrite each other).
    """
    installed = {
        name: [dist for dist in dists if installed_version(dist)]
        for name, dists in DISTRIBUTIONS.items()
    }
    for dists in installed.values():
        if len(dists) > 1:
            raise ImportError(
                f'mmseg_contrast found {" and ".join(dists)} installed side '
                "by side, which overwrite each other's files: run "
                f'`pip uninstall {" ".join(dists)}`, then '
                '`pip install "mmseg_contrast[onedl]"` or '
                '`pip install "mmseg_contrast[openmmlab]"`.')

    found = [dist for dists in installed.values() for dist in dists]
    stock = [dist for dist in found if not dist.startswith('onedl-')]
    for module in MODULES:
        try:
            _import_quietly(module)
        # Whatever goes wrong in there (a version assertion, a binary of
        # another torch, an API that Python dropped), the cure is the same.
        except Exception as error:
            raise ImportError(
                'mmseg_contrast needs a working OpenMMLab stack, but '
                f'{_reason(module, error)}: {_remedy(stock)}.') from error

    if stock and len(stock) < len(found):
        warnings.warn(
            f'mmseg_contrast runs on a mixture of OpenMMLab releases and '
            f'forks ({", ".join(found)}), which nobody tests.',
            stacklevel=2)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None if it isn't installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def allow_checkpoint_classes() -> None:
    """Let ``torch.load(weights_only=True)`` read mmengine's checkpoints.

    Since torch 2.6 that is the default, and stock mmengine 0.10.7 can neither
    resume nor test what it has saved itself: a checkpoint holds logs
    (``HistoryBuffer``), numpy scalars and config dicts. Only these are
    allowed; everything else is refused as before. Calling it again does no
    harm, and is needed once the fork of mmengine has loaded a file: it
    allows some of the same classes for that time and then takes them off.
    """
    import torch

    if not _accepts_named_globals(torch.__version__):
        return
    import numpy as np
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    # A numpy array is pickled under the name that the module had then.
    core = import_module(
        'numpy._core.multiarray' if hasattr(np, '_core') else
        'numpy.core.multiarray')
    allowed: list[Any] = [
        HistoryBuffer, ConfigDict, np.ndarray, np.dtype,
        (_history_method, 'builtins.getattr')
    ]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        allowed.append((core._reconstruct, f'{module}._reconstruct'))
        allowed.append((core.scalar, f'{module}.scalar'))
    # Booleans, integers and floats; no object arrays, which could hold code.
    allowed += sorted({type(np.dtype(code)) for code in '?bBhHiIlLqQefd'},
                      key=repr)
    torch.serialization.add_safe_globals(allowed)


def shipped_path(relative: str) -> Path:
    """Where a file of ``configs/`` or ``tools/`` lies on this machine.

    A wheel carries them in ``mmseg_contrast/.mim``; a clone (also an editable
    install) has them beside the package.

    Args:
        relative (str): For example ``configs/dacs``.

    Returns:
        Path: The existing file or folder.

    Raises:
        FileNotFoundError: If there is no such file in either place.
    """
    package = Path(__file__).resolve().parent
    for root in (package / '.mim', package.parent):
        if (root / relative).exists():
            return root / relative
    raise FileNotFoundError(
        f'mmseg_contrast ships no {relative}: looked in {package / ".mim"} '
        f'and {package.parent}.')


def _import_quietly(module: str) -> None:
    """Import a module without what the forks say at every import.

    They lack operators and a platform of their own, which is no news; who
    needs one of these is told again when a config asks for it.
    """
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(printed):
            warnings.filterwarnings(
                'ignore', message='Fail to import ``MultiScaleDeform')
            import_module(module)
    finally:
        for line in printed.getvalue().splitlines(keepends=True):
            if line.strip() != 'Could not import OneDL':
                sys.stdout.write(line)


def _reason(module: str, error: Exception) -> str:
    """What went wrong, as the middle of a sentence."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name == 'mmcv._ext':
            return ('the installed mmcv has no compiled operators, which '
                    'stock mmsegmentation needs')
        if error.name == module:
            return f'{DISTRIBUTIONS.get(module, (module,))[0]} is missing'
        return f'{error.name}, which {module} imports, is missing'
    if isinstance(error, AssertionError) and module.startswith('mmseg'):
        versions = ', '.join(
            f'{dist} {installed_version(dist)}'
            for dists in DISTRIBUTIONS.values() for dist in dists
            if installed_version(dist))
        return f'the installed versions do not fit together ({versions})'
    lines = str(error).strip().splitlines()
    detail = f': {lines[0]}' if lines else ''
    return f'importing {module} fails ({type(error).__name__}{detail})'


def _remedy(stock: list[str]) -> str:
    """What to type, as the end of a sentence."""
    if not stock:
        return ('run `pip install "mmseg_contrast[onedl]"`, or '
                '`pip install "mmseg_contrast[openmmlab]"` for the stock '
                'releases')
    # The forks would overwrite the files of the stock releases.
    return (f'run `pip uninstall {" ".join(stock)}` and then '
            '`pip install "mmseg_contrast[onedl]"`, or mend the stock '
            'releases with `pip install "mmseg_contrast[openmmlab]"`')


def _accepts_named_globals(torch_version: str) -> bool:
    """Whether torch is 2.6 or newer, the first that needs the allow-list."""
    major, minor = torch_version.split('.')[:2]
    return (int(major), int(minor)) >= (2, 6)


def _history_method(owner: type, name: str) -> Any:
    """The one use of ``getattr`` that a HistoryBuffer's pickle makes."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in HISTORY_METHODS:
        raise UnpicklingError(
            f'A checkpoint may not ask for the attribute {name} of {owner}.')
    return getattr(owner, name)
