"""Stands for the compiled operators that stock mmseg asks of mmcv.

mmcv-lite has none, and the models and configs tested here use none. Imported
at the start of each Python of .venv-stock, by a .pth file that
requirements/install.py writes: tests start processes of their own.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class Stub(ModuleType):
    """A module that has a class of any name."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


for name in ('mmcv.ops', 'mmcv._ext'):
    stub = Stub(name)
    stub.__spec__ = ModuleSpec(name, None)
    sys.modules.setdefault(name, stub)
