"""Stands for the compiled operators that stock mmseg asks of mmcv.

mmcv-lite has none, and the models and configs tested here use none. Found by
each Python whose path this folder is on: tests start processes of their own.
"""

import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType


class Stub(ModuleType):
    """A module that has a class of any name."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


def installed(name):
    """Whether there is a distribution of this name."""
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


if installed('mmcv-lite') and installed('mmsegmentation'):
    for name in ('mmcv.ops', 'mmcv._ext'):
        stub = Stub(name)
        stub.__spec__ = ModuleSpec(name, None)
        sys.modules.setdefault(name, stub)
