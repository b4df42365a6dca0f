"""Metafiles, READMEs and the table of traps name what is there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ['cluda', 'contrastive_seg', 'dacs', 'daformer', 'hrda',
           'label_efficient', 'local_contrast', 'mic', 'mochi', 'pipa',
           'proca', 'protoseg', 'rekd', 'sdca', 'sepico', 'source_only',
           'spcl']
GUIDES = [f'configs/{folder}/README.md' for folder in FOLDERS] + [
    'docs/parity.md']


def metafile(folder):
    return yaml.safe_load(
        (ROOT / 'configs' / folder / 'metafile.yaml').read_text())


def shipped(folder):
    found = (ROOT / 'configs' / folder).glob('*.py')
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_metafile_has_every_config_once(folder):
    content = metafile(folder)
    models = content['Models']
    configs = [model['Config'] for model in models]
    assert len(configs) == len(set(configs))
    assert set(configs) == shipped(folder) != set()
    for model in models:
        assert model['Name'] == Path(model['Config']).stem
    names = {one['Name'] for one in content['Collections']}
    assert {model['In Collection'] for model in models} == names


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_metafile_has_the_keys_of_mmseg(folder):
    content = metafile(folder)
    for collection in content['Collections']:
        assert {'Name', 'License', 'Metadata', 'Paper', 'README',
                'Frameworks'} == set(collection)
        assert collection['README'] == f'configs/{folder}/README.md'
        assert (ROOT / collection['README']).is_file()
    for model in content['Models']:
        assert {'Name', 'In Collection', 'Results', 'Config', 'Metadata',
                'Paper', 'Code', 'Framework'} == set(model)
        assert {'Training Data', 'Batch Size', 'Architecture',
                'Training Resources'} == set(model['Metadata'])
        assert (ROOT / model['Code']).is_file()
        batch = re.search(r'_(\d+)xb(\d+)-', model['Name'])
        assert int(batch[1]) * int(batch[2]) == model['Metadata'][
            'Batch Size']


def test_names_are_unique_and_all_metafiles_are_imported():
    imported = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    found = sorted(str(path.relative_to(ROOT)) for path in
                   (ROOT / 'configs').rglob('metafile.y*ml'))
    assert imported['Import'] == found
    assert found == [f'configs/{folder}/metafile.yaml' for folder in FOLDERS]
    for kind in ('Models', 'Collections'):
        names = [one['Name'] for path in found for one in
                 yaml.safe_load((ROOT / path).read_text())[kind]]
        assert len(names) == len(set(names))


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_readme_links_to_every_config(folder):
    text = (ROOT / 'configs' / folder / 'README.md').read_text()
    links = re.findall(r'\[config\]\((\S+?\.py)\)', text)
    assert {f'configs/{folder}/{link}' for link in links} == shipped(folder)
    assert len(links) == len(set(links))
    # What others published is no result: the column before the link is ours.
    results = {model['Config']: model['Results']
               for model in metafile(folder)['Models']}
    for row in (line for line in text.splitlines() if '[config](' in line):
        link = re.search(r'\[config\]\((\S+?)\)', row)[1]
        ours = row.strip('|').split('|')[-2].strip()
        if results[f'configs/{folder}/{link}']:
            assert re.fullmatch(r'[\d.]+.*', ours), row
        else:
            assert ours == 'not run yet', row


@pytest.mark.parametrize('guide', GUIDES)
def test_links_lead_to_files(guide):
    path = ROOT / guide
    targets = re.findall(r'\]\(([^)#\s]+)(?:#\S*)?\)', path.read_text())
    local = [one for one in targets if '://' not in one]
    assert local
    assert [one for one in local if not (path.parent / one).exists()] == []


@pytest.mark.parametrize('guide', GUIDES)
def test_paths_in_the_text_exist(guide):
    """Scripts, configs and modules that a guide names."""
    text = (ROOT / guide).read_text()
    named = set(re.findall(
        r'\b(?:tools|configs|docs|tests)/[\w./-]+\.(?:py|sh|md|npz)\b', text))
    assert named
    assert [one for one in named if not (ROOT / one).exists()] == []
    if guide == 'docs/parity.md':
        named = set(re.findall(
            r'`((?:ops|models|adaptation|datasets)/[\w/]+\.py)`', text))
        assert len(named) > 10
        assert [one for one in named if not (
            ROOT / 'mmseg_contrast' / one).exists()] == []


def functions(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body
            if isinstance(node, ast.FunctionDef)}


def test_quoted_tests_exist():
    text = (ROOT / 'docs' / 'parity.md').read_text()
    quoted = set(re.findall(r'`(test_\w+\.py)::(\w+)`', text))
    assert len(quoted) > 40
    missing = [f'{file}::{name}' for file, name in sorted(quoted)
               if not (ROOT / 'tests' / file).is_file()
               or name not in functions(ROOT / 'tests' / file)]
    assert missing == []
    # Not broken across lines or written in another way.
    assert len(re.findall(r'test_\w+\.py::', text)) == len(
        re.findall(r'`test_\w+\.py::\w+`', text))


def test_every_trap_has_a_line_and_a_test():
    text = (ROOT / 'docs' / 'parity.md').read_text()
    rows = [line.strip('|').split('|') for line in text.splitlines()
            if re.match(r'\| (T\d+|[a-e]) \|', line)]
    assert [row[0].strip() for row in rows] == [
        *(f'T{i}' for i in range(1, 40)), *'abcde']
    for row in rows:
        assert len(row) == 5, row[0]
        status = row[2].strip()
        assert re.match(
            r'kept|option|fixed|later: (HRDA|MIC|SePiCo)|in the doc|for tests'
            r"|not copied|left|their result isn't used", status), row[0]
        assert 'test_' in row[4] or re.search('no test: .', row[4]), row[0]


def test_every_test_of_the_traps_is_quoted():
    text = (ROOT / 'docs' / 'parity.md').read_text()
    own = functions(ROOT / 'tests' / 'test_parity.py')
    assert [name for name in own if name.startswith('test_')
            and name not in text] == []
