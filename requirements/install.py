"""Install what is missing in the environment of the running Python.

    python requirements/install.py [lint | stock]

Called by the Makefile, with nothing but the standard library. A torch that
works, and a stock OpenMMLab stack, are never replaced. A stamp in the
environment's folder makes the next call return at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STOCK = ('mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmsegmentation')
CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']


def main() -> None:
    """Install the requirements named on the command line."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f'setup: {sys.executable} is Python '
                 f'{platform.python_version()}, but mmseg_contrast needs 3.10 '
                 'to 3.13: deactivate this environment, or run make with '
                 'PYTHON=/path/to/python3.12.')
    name = sys.argv[1] if len(sys.argv) > 1 else 'tested'
    wanted = (ROOT / 'requirements' / f'{name}.txt').read_text()

    # The clone's folder counts: an environment may serve several clones.
    key = hashlib.sha256(f'{wanted}{ROOT}'.encode()).hexdigest()[:12]
    stamp = Path(sys.prefix) / f'.mmseg_contrast-{name}-{key}'
    if stamp.exists():
        return
    lines, constraints = keep_what_is_there(requirement_lines(wanted))
    say(f'environment {sys.prefix}, Python {platform.python_version()}')
    install(lines, constraints)
    if name != 'lint':
        mend_opencv(lines)
    if Path(sys.prefix).resolve() == ROOT / '.venv':
        # Our own environment: tools of any folder find the package.
        run_pip(['--no-deps', '--no-build-isolation', '-e', str(ROOT)])
    if Path(sys.prefix).resolve() == ROOT / '.venv-stock':
        stub_operators()
    try:
        stamp.touch()
    except OSError:
        pass  # a read-only environment is looked at again next time
    say('ready')


def requirement_lines(text: str) -> list[str]:
    """The lines of a requirements file that name something."""
    lines = (line.split('#')[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def project(line: str) -> str:
    """Name of the distribution that a requirement asks for."""
    return re.split(r'[^A-Za-z0-9_.-]', line)[0].lower()


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def keep_what_is_there(lines: list[str]) -> tuple[list[str], list[str]]:
    """Drop the requirements that would replace torch or the stock stack.

    Args:
        lines (list[str]): Requirements.

    Returns:
        tuple: Requirements that remain, and constraints for their
        dependencies.
    """
    constraints = []
    if works('import torch'):
        lines = [line for line in lines if project(line) != 'torch']
        version = installed_version('torch')
        if version is not None:
            constraints.append(f'torch=={version}')
            say(f'keeping torch {version}')
    stock = [name for name in STOCK if installed_version(name)]
    if stock:
        # Compiled for the numpy and torch beside them: only add to it.
        say(f'keeping {", ".join(stock)} and what is installed beside them')
        lines = [
            line for line in lines if not project(line).startswith('onedl-')
            and installed_version(project(line)) is None
        ]
    return lines, constraints


def install(lines: list[str], constraints: list[str]) -> None:
    """Let pip install the requirements.

    Args:
        lines (list[str]): Requirements.
        constraints (list[str]): Versions that must not change.
    """
    if not lines:
        return
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / 'requirements.txt'
        requirements.write_text('\n'.join(lines) + '\n')
        constraint = Path(folder) / 'constraints.txt'
        constraint.write_text('\n'.join(constraints) + '\n')
        arguments = ['-r', str(requirements), '-c', str(constraint)]
        if any(project(line) == 'torch' for line in lines) and cpu_only():
            say('no NVIDIA GPU: using the small CPU build of torch')
            arguments += ['--extra-index-url', CPU_INDEX]
        say(f'installing {len(lines)} requirements (minutes, once)')
        run_pip(arguments)


def cpu_only() -> bool:
    """Whether torch without CUDA (0.2 instead of 3 GB) is the right one."""
    if (platform.system() != 'Linux' or shutil.which('nvidia-smi')
            or os.path.exists('/proc/driver/nvidia')):
        return False
    try:
        with urllib.request.urlopen(f'{CPU_INDEX}/torch/', timeout=5):
            return True
    except OSError:
        return False  # not reachable: the default index will do


def run_pip(arguments: list[str]) -> None:
    """Run ``pip install``, showing its larger steps, all of it if it fails.

    Args:
        arguments (list[str]): What follows ``pip install``.
    """
    if importlib.util.find_spec('pip') is None:
        subprocess.run([sys.executable, '-m', 'ensurepip', '--upgrade'],
                       check=True,
                       stdout=subprocess.DEVNULL)
    command = [
        *PIP, 'install', '--retries', '10', '--timeout', '60', '--no-input',
        '--progress-bar', 'off', *arguments
    ]
    output: list[str] = []
    with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace') as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if worth_showing(line):
                say(f'  {line.strip()[:66]}')
    if process.returncode:
        sys.stdout.write(''.join(output[-40:]))
        sys.exit('setup: pip failed, see above: '
                 f'{" ".join(command[1:4])} ...')


def worth_showing(line: str) -> bool:
    """Whether a line of pip's tells of something that takes long."""
    if re.match(r'(Building wheel|Installing (build|collected))', line):
        return True
    return bool(re.match(r'\s*Downloading .*\(([\d.]+ GB|\d{2,}.* MB)', line))


def mend_opencv(lines: list[str]) -> None:
    """Take OpenCV without windows where the libraries for these are missing.

    Args:
        lines (list[str]): Requirements, for the version.
    """
    pins = [line for line in lines if project(line) == 'opencv-python']
    if not pins or works('import cv2'):
        return
    say('no window libraries (libGL): using opencv-python-headless')
    subprocess.run([*PIP, 'uninstall', '-q', '-y', 'opencv-python'],
                   check=True)
    run_pip(['--no-deps', pins[0].replace('python', 'python-headless', 1)])


def stub_operators() -> None:
    """Let stock mmseg be imported without mmcv's compiled operators."""
    folder = Path(sysconfig.get_path('purelib'))
    (folder / 'mmcv_operators.pth').write_text(
        f'{ROOT / "tests" / "stubs"}\nimport mmcv_operators\n')


def works(statement: str) -> bool:
    """Whether a statement runs in a fresh interpreter."""
    return subprocess.run([sys.executable, '-c', statement],
                          capture_output=True).returncode == 0


def say(text: str) -> None:
    """Report a step, at once."""
    sys.stdout.write(f'setup: {text}\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
