"""Packaging. Tool settings live in pyproject.toml."""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: What MIM and shipped_path() look for inside of an installed package.
SHIPPED = ('configs', 'tools', 'model-index.yml')
SUFFIXES = ('.py', '.yaml', '.yml', '.md', '.sh')


def version() -> str:
    """Read the version without importing the package."""
    text = (ROOT / 'mmseg_contrast' / '__init__.py').read_text()
    return re.search(r"^__version__ = '(.+)'$", text, re.M).group(1)


def shipped_files() -> list[Path]:
    """Configs and tools, relative to the root."""
    files = []
    for name in SHIPPED:
        path = ROOT / name
        found = [path] if path.is_file() else sorted(path.rglob('*'))
        files += [
            file.relative_to(ROOT) for file in found
            if file.is_file() and file.suffix in SUFFIXES
        ]
    return files


class BuildWithMim(build_py):
    """Copy configs and tools to mmseg_contrast/.mim of what is built.

    They go straight to the build folder: nothing appears in the source tree,
    and an editable install, which builds no copy, uses that tree itself.
    """

    def run(self) -> None:
        """Build the package, then add what is shipped with it."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmseg_contrast' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        for file in shipped_files():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target / file)


def build_options() -> dict[str, dict[str, str]]:
    """Let a wheel be built outside of the source tree.

    A left-over ``build`` folder would also put deleted modules into the next
    wheel.
    """
    if 'bdist_wheel' not in sys.argv:
        return {}
    folder = tempfile.mkdtemp(prefix='mmseg_contrast-build-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return dict(build=dict(build_base=folder), egg_info=dict(egg_base=folder))


def long_description() -> str:
    """The README, if it is there (it is not in every build context)."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='mmseg_contrast',
    version=version(),
    description='Unsupervised domain adaptation and contrastive training as '
    'a plugin of MMSegmentation 1.x',
    long_description=long_description(),
    long_description_content_type='text/markdown',
    author='The mmseg_contrast authors',
    license='Apache-2.0',
    keywords='domain adaptation, semantic segmentation, contrastive learning',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10,<3.14',
    packages=find_packages(include=['mmseg_contrast', 'mmseg_contrast.*']),
    # mmengine, mmcv and mmseg exist twice (stock and onedl), and a dependency
    # cannot say "either": the extras do, and environment.py checks.
    install_requires=['torch>=2.1', 'numpy>=1.23'],
    extras_require={
        'onedl': [
            'onedl-mmengine>=0.10.12,<0.11',
            'onedl-mmcv>=2.3.6,<2.4',
            'onedl-mmsegmentation>=1.4.2,<1.5',
        ],
        'openmmlab': [
            'mmengine==0.10.7',
            'mmcv>=2.0.0rc4,<2.2.0',
            'mmsegmentation==1.2.2',
            # Imported by mmsegmentation, which doesn't declare them.
            'ftfy',
            'regex',
            # The last with pkg_resources, which mmengine and mmcv import.
            'setuptools<81',
        ],
        'tests': ['pytest>=8', 'pytest-xdist>=3.3', 'hypothesis>=6'],
    },
    cmdclass=dict(build_py=BuildWithMim),
    options=build_options(),
    zip_safe=False)
