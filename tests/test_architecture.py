"""Rooms import only lower rooms."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / 'mmseg_contrast'
MAY_IMPORT = dict(
    ops=set(),
    contrast={'ops'},
    models={'ops', 'contrast'},
    datasets={'ops'},
    evaluation={'ops'},
    adaptation={'ops', 'contrast', 'models'},
    engine={'ops', 'contrast', 'models', 'datasets', 'evaluation',
            'adaptation'})
ALLOWED_IN_OPS = {'__future__', 'torch', 'mmengine', 'collections', 'math',
                  'contextlib', 'dataclasses', 'hashlib', 'typing'}


def imported(path):
    """Absolute names that a file imports."""
    package = ('mmseg_contrast', *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if (
                node.level) else ()
            name = '.'.join([*base, *filter(None, [node.module])])
            yield name
            yield from (f'{name}.{alias.name}' for alias in node.names)


def test_a_room_imports_only_lower_rooms():
    seen = set()
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1 or parts[0] == '.mim':
            continue
        room = parts[0]
        for name in imported(path):
            other = name.split('.')
            if other[0] == 'mmseg_contrast' and len(other) > 1 and (
                    other[1] in MAY_IMPORT and other[1] != room):
                seen.add((room, other[1]))
                assert other[1] in MAY_IMPORT[room], f'{path}: {name}'
            if room == 'ops':
                assert other[0] in ALLOWED_IN_OPS | {'mmseg_contrast'}, (
                    f'{path}: {name}')
                if other[0] == 'mmengine':
                    assert name.startswith('mmengine.dist'), name
    assert ('contrast', 'ops') in seen
    assert ('adaptation', 'ops') in seen and ('engine', 'adaptation') in seen


def test_every_room_is_known():
    rooms = {p.parent.name for p in PACKAGE.glob('*/__init__.py')}
    assert rooms == set(MAY_IMPORT)
