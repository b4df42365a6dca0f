import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tree(root):
    """Every file below, except what tests running beside this one write."""
    return sorted(
        str(path.relative_to(root)) for path in root.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what goes into a build, under a path with spaces."""
    copy = tmp_path_factory.mktemp('a clone')
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE',
                 'CHANGELOG.md', 'CITATION.cff', 'model-index.yml'):
        shutil.copy(ROOT / name, copy)
    for name in ('mmseg_contrast', 'configs', 'tools', 'tests',
                 'requirements'):
        shutil.copytree(
            ROOT / name, copy / name,
            ignore=shutil.ignore_patterns('__pycache__', '.mim'))
    # Kinds of files that are easily forgotten, or easily taken along.
    for name in ('configs/dacs/metafile.yaml', 'configs/dacs/README.md',
                 'configs/dacs/junk.pth', 'tools/junk.pyc'):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    return copy


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    pytest.importorskip('setuptools')
    before = tree(source)
    out = tmp_path_factory.mktemp('wheel')
    done = subprocess.run([
        sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index',
        '--no-build-isolation', '-q', '-w', str(out), str(source)
    ], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Building leaves nothing in the source tree.
    assert tree(source) == before
    path, = out.iterdir()
    return path


def test_wheel_carries_configs_and_tools(wheel, source):
    assert wheel.name == 'mmseg_contrast-0.1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    roots = {name.split('/')[0] for name in names}
    assert roots == {'mmseg_contrast', 'mmseg_contrast-0.1.0.dist-info'}

    mim = {n.removeprefix('mmseg_contrast/.mim/') for n in names
           if n.startswith('mmseg_contrast/.mim/')}
    assert {
        'model-index.yml', 'configs/_base_/default_runtime.py',
        'configs/dacs/metafile.yaml', 'configs/dacs/README.md',
        'tools/train.py', 'tools/dist_train.sh'
    } <= mim
    assert not any(name.endswith(('.pth', '.pyc')) for name in mim)
    expected = {
        name for name in tree(source)
        if re.match(r'(configs|tools)/.*\.(py|yaml|yml|md|sh)$', name)
    }
    assert mim == expected | {'model-index.yml'}

    packages = {name for name in tree(source)
                if re.match(r'mmseg_contrast/.*\.py$', name)}
    assert packages == {
        n for n in names
        if re.match(r'mmseg_contrast/(?!\.mim/).*\.py$', n)
    }


def test_wheel_demands_neither_stack(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(
            'mmseg_contrast-0.1.0.dist-info/METADATA').decode()
    demands = re.findall(r'^Requires-Dist: (.*)$', text, re.M)
    assert [d for d in demands if 'extra ==' not in d] == [
        'torch>=2.1', 'numpy>=1.23'
    ]
    extras = re.findall(r'^Provides-Extra: (.*)$', text, re.M)
    assert extras == ['onedl', 'openmmlab', 'tests']
    python, = re.findall(r'^Requires-Python: (.*)$', text, re.M)
    assert set(python.split(',')) == {'>=3.10', '<3.14'}
    assert any(d.startswith('mmsegmentation==1.2.2;') for d in demands)


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = ('from mmseg_contrast.environment import shipped_path\n'
            'from mmengine.config import Config\n'
            "path = shipped_path('configs/_base_/default_runtime.py')\n"
            "print(path, Config.fromfile(path).default_scope)")
    done = subprocess.run([sys.executable, '-c', code],
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)),
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path / 'mmseg_contrast/.mim/configs/_base_/default_runtime.py'
    assert done.stdout.strip() == f'{path} mmseg'


def test_editable_install_uses_the_clone(source, tmp_path):
    before = tree(source)
    target = tmp_path / 'env'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip',
                    str(target)], check=True)
    python = target / 'bin' / 'python'
    # pip and setuptools are those of the outer environment.
    site, = (target / 'lib').glob('python*/site-packages')
    outer = [p for p in sys.path if p.endswith('site-packages')]
    (site / 'outer.pth').write_text('\n'.join(outer) + '\n')
    subprocess.run([str(python), '-m', 'pip', 'install', '-q', '--no-deps',
                    '--no-index', '--no-build-isolation', '-e', str(source)],
                   check=True)
    assert tree(source) == before
    # Where it would be imported from; importing it takes seconds.
    code = ('from importlib.util import find_spec\n'
            "print(find_spec('mmseg_contrast').origin)")
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([str(python), '-c', code], env=env, cwd=tmp_path,
                          check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(
        source / 'mmseg_contrast' / '__init__.py')


def test_every_metafile_is_indexed():
    index = (ROOT / 'model-index.yml').read_text()
    listed = re.findall(r'^\s*- (\S+)$', index, re.M)
    found = [str(p.relative_to(ROOT))
             for p in sorted((ROOT / 'configs').rglob('metafile.yaml'))]
    assert listed == found


# The set-up script of the Makefile


@pytest.fixture
def setup_script(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        'install', ROOT / 'requirements' / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'say', lambda text: None)
    return module


TESTED = ['torch==2.13.0', 'numpy==2.4.6; python_version >= "3.11"',
          'onedl-mmcv==2.3.6', 'pytest==9.2.0']


def test_pins_are_exact_for_every_python(setup_script):
    text = (ROOT / 'requirements' / 'tested.txt').read_text()
    lines = setup_script.requirement_lines(text)
    assert all(re.match(r'[a-z0-9-]+==[\d.]+($|; python_version)', line)
               for line in lines), lines
    assert 'torch==2.13.0' in lines
    # What is pinned by Python version is pinned for all of them.
    conditions = {}
    for line in lines:
        conditions.setdefault(setup_script.project(line), []).append(
            line.partition('; ')[2])
    assert set(map(tuple, conditions.values())) == {
        ('', ),
        ('python_version >= "3.11"', 'python_version < "3.11"')
    }


def test_fresh_environment_gets_every_pin(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script, 'works', lambda statement: False)
    monkeypatch.setattr(setup_script, 'installed_version', lambda name: None)
    assert setup_script.keep_what_is_there(TESTED) == (TESTED, [])


def test_working_torch_is_never_replaced(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script, 'works', lambda statement: True)
    monkeypatch.setattr(setup_script, 'installed_version',
                        {'torch': '2.8.0+cu128'}.get)
    assert setup_script.keep_what_is_there(TESTED) == (
        TESTED[1:], ['torch==2.8.0+cu128'])


def test_stock_stack_is_only_added_to(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script, 'works', lambda statement: True)
    monkeypatch.setattr(
        setup_script, 'installed_version', {
            'torch': '2.1.0',
            'numpy': '1.26.4',
            'mmcv': '2.1.0',
            'mmsegmentation': '1.2.2'
        }.get)
    assert setup_script.keep_what_is_there(TESTED) == (
        ['pytest==9.2.0'], ['torch==2.1.0'])


def test_stamp_ends_the_second_call(setup_script, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(sys, 'prefix', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', ['install.py'])
    monkeypatch.setattr(setup_script, 'keep_what_is_there', lambda lines:
                        (lines, []))
    monkeypatch.setattr(setup_script, 'install',
                        lambda lines, constraints: calls.append(len(lines)))
    monkeypatch.setattr(setup_script, 'mend_opencv', lambda lines: None)
    setup_script.main()
    setup_script.main()
    assert len(calls) == 1
    stamp, = tmp_path.iterdir()
    assert stamp.name.startswith('.mmseg_contrast-tested-')


def test_progress_shows_what_takes_long(setup_script):
    shown = setup_script.worth_showing
    assert shown('  Downloading torch-2.13.0.whl (532.1 MB)\n')
    assert shown('Installing collected packages: torch\n')
    assert not shown('  Downloading ftfy-6.3.1.whl (44 kB)\n')
    assert not shown('  Downloading numpy.whl (9.1 MB)\n')
    assert not shown('Requirement already satisfied: numpy\n')
