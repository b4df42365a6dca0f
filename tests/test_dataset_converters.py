"""Converters on tiny files of the true formats."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmseg_contrast.datasets import conversion
from mmseg_contrast.datasets.conversion import (
    CITYSCAPES_TRAIN_IDS,
    LabelFormat,
    Part,
    convert,
    read_indices,
)

TOOLS = Path(__file__).resolve().parents[1] / 'tools/dataset_converters'
H, W = 5, 8
#: Labels with GTA5's ids, with Cityscapes', and what both must become.
IDS = np.r_[np.arange(35), [7] * 5].reshape(H, W).astype(np.uint8)
CITY_IDS = np.where(IDS == 34, 255, IDS).astype(np.uint8)
TRAIN_IDS = np.array([
    [255, 255, 255, 255, 255, 255, 255, 0],
    [1, 255, 255, 2, 3, 4, 255, 255],
    [255, 5, 255, 6, 7, 8, 9, 10],
    [11, 12, 13, 14, 15, 255, 255, 16],
    [17, 18, 255, 0, 0, 0, 0, 0],
], dtype=np.uint8)


# -- files of the true formats --------------------------------------------
def write_image(path: Path, size: tuple[int, int] = (H, W), seed: int = 0
                ) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    cv2.imwrite(str(path), random.randint(0, 256, (*size, 3), dtype=np.uint8))


def write_palette(path: Path, ids: np.ndarray) -> None:
    """As GTA5's labels: the index is the id, the palette are colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids).convert('P')
    image.putdata(ids.reshape(-1).tolist())
    image.putpalette([(i * 7 + c * 50) % 256 for i in range(256)
                      for c in range(3)])
    image.save(path)
    with Image.open(path) as check:
        assert check.mode == 'P'


def write_grey(path: Path, ids: np.ndarray) -> None:
    """As Cityscapes' labelIds: 8 bits, one channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)


def write_synthia(path: Path, ids: np.ndarray) -> None:
    """As SYNTHIA's: RGB of 16 bits, red the class; byte by byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = ids.shape
    pixels = np.zeros((height, width, 3), dtype='>u2')
    pixels[..., 0] = ids
    pixels[..., 1] = 300 + np.arange(width)  # instances, above 8 bits
    pixels[..., 2] = 7
    rows = b''.join(b'\0' + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack('>I', len(data)) + kind + data +
                struct.pack('>I', zlib.crc32(kind + data)))

    header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) +
                     chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def write_gta(root: Path, count: int = 3) -> Path:
    for i in range(1, count + 1):
        write_image(root / f'images/{i:05d}.png', seed=i)
        write_palette(root / f'labels/{i:05d}.png', np.roll(IDS, i - 1))
    return root


def write_synthia_tree(root: Path, count: int = 2) -> Path:
    for i in range(count):
        write_image(root / f'RGB/{i:07d}.png', seed=i)
        write_synthia(root / f'GT/LABELS/{i:07d}.png',
                      (np.arange(H * W).reshape(H, W) + i) % 23)
    return root


def write_cityscapes(root: Path) -> Path:
    for split, city in (('train', 'aachen'), ('train', 'bochum'),
                        ('val', 'munster'), ('test', 'berlin')):
        stem = f'{split}/{city}/{city}_000000_000019'
        write_image(root / f'leftImg8bit/{stem}_leftImg8bit.png')
        write_grey(root / f'gtFine/{stem}_gtFine_labelIds.png', CITY_IDS)
        write_grey(root / f'gtFine/{stem}_gtFine_instanceIds.png', IDS)
    return root


def write_acdc(root: Path) -> Path:
    for condition, split in itertools.product(
            ('fog', 'night', 'rain', 'snow'), ('train', 'val', 'test')):
        stem = f'{condition}/{split}/GOPR0475/GOPR0475_frame_000041'
        write_image(root / f'rgb_anon/{stem}_rgb_anon.png')
        ref = stem.replace(f'/{split}/', f'/{split}_ref/')
        write_image(root / f'rgb_anon/{ref}_rgb_ref_anon.png')
        if split != 'test':
            write_grey(root / f'gt/{stem}_gt_labelTrainIds.png', TRAIN_IDS)
            write_grey(root / f'gt/{stem}_gt_labelIds.png', CITY_IDS)
    return root


def write_dark_zurich(root: Path) -> Path:
    for folder, sequence in (
            ('train/night', 'GOPR0351'), ('train/night', 'GOPR0352'),
            ('train/day', 'GOPR0345'), ('train/twilight', 'GOPR0347'),
            ('val/night', 'GOPR0356'), ('test/night', 'GOPR0364')):
        stem = f'{folder}/{sequence}/{sequence}_frame_000321'
        write_image(root / f'rgb_anon/{stem}_rgb_anon.png')
        if folder == 'val/night':
            write_grey(root / f'gt/{stem}_gt_labelTrainIds.png', TRAIN_IDS)
            write_grey(root / f'gt/{stem}_gt_labelIds.png', CITY_IDS)
    ref = 'val_ref/day/GOPR0357/GOPR0357_frame_000061'
    write_image(root / f'rgb_anon/{ref}_rgb_anon.png')
    return root


def write_nighttime(root: Path) -> Path:
    for i in range(2):
        stem = f'test/night/0_frame_{i:04d}'
        write_image(root / f'leftImg8bit/{stem}_leftImg8bit.png')
        folder = root / 'gtCoarse_daytime_trainvaltest'
        write_grey(folder / f'{stem}_gtCoarse_labelTrainIds.png', TRAIN_IDS)
    return root


# -- helpers --------------------------------------------------------------
def run(tool: str, *args: object) -> int:
    """The tool's main, in this process unless ``--nproc`` says otherwise."""
    words = [str(a) for a in args]
    if '--nproc' not in words:
        words += ['--nproc', '1']
    return runpy.run_path(str(TOOLS / f'{tool}.py'))['main'](words)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes()
            for p in sorted(root.rglob('*')) if p.is_file()}


def labels(path: Path) -> np.ndarray:
    """Train ids of an output, which must be a plain 8-bit PNG."""
    with Image.open(path) as image:
        assert image.mode == 'L' and image.format == 'PNG'
        return np.asarray(image)


def times(root: Path) -> dict[str, int]:
    for path in root.rglob('*.png'):
        os.utime(path, ns=(10**18, 10**18))
    return {str(p): p.stat().st_mtime_ns for p in root.rglob('*.png')}


# -- formats --------------------------------------------------------------
def test_gta(tmp_path, capsys):
    root = write_gta(tmp_path / 'gta')
    before = files(root)
    assert run('gta', root) == 0
    after = files(root)
    made = {'labels/00001_labelTrainIds.png', 'labels/00002_labelTrainIds.png',
            'labels/00003_labelTrainIds.png', 'pairs.txt'}
    assert set(after) - set(before) == made
    assert {k: after[k] for k in before} == before
    for i in range(3):
        got = labels(root / f'labels/{i + 1:05d}_labelTrainIds.png')
        np.testing.assert_array_equal(got, np.roll(TRAIN_IDS, i))
    assert after['pairs.txt'] == b'00001\n00002\n00003\n'
    out = capsys.readouterr()
    assert out.out.splitlines()[-1] == (
        f'{root}: 3 label files written, 0 problems')
    assert out.err == '' and '3/3' in out.out


def test_gta_in_grey(tmp_path):
    root = write_gta(tmp_path, 1)
    write_grey(root / 'labels/00001.png', IDS)
    assert run('gta', root) == 0
    np.testing.assert_array_equal(
        labels(root / 'labels/00001_labelTrainIds.png'), TRAIN_IDS)


def test_synthia(tmp_path):
    root = write_synthia_tree(tmp_path / 'synthia')
    before = files(root)
    assert run('synthia', root) == 0
    after = files(root)
    assert {k: after[k] for k in before} == before
    #         0   1   2  3  4  5  6  7  8   9  10  11  12
    table = [255, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17,
             # 13   14   15 16 17  18  19  20  21 22
             255, 255, 6, 9, 12, 14, 15, 16, 3, 255]
    for i in range(2):
        ids = (np.arange(H * W).reshape(H, W) + i) % 23
        got = labels(root / f'GT/LABELS/{i:07d}_labelTrainIds.png')
        assert got.tolist() == [[table[c] for c in row] for row in ids]
    assert len(after) == len(before) + 2  # no list


def test_cityscapes(tmp_path, capsys):
    root = write_cityscapes(tmp_path)
    before = files(root)
    assert run('cityscapes', root) == 0
    after = files(root)
    made = sorted(set(after) - set(before))
    assert made == [
        f'gtFine/{s}/{c}/{c}_000000_000019_gtFine_labelTrainIds.png'
        for s, c in (('train', 'aachen'), ('train', 'bochum'),
                     ('val', 'munster'))]
    assert {k: after[k] for k in before} == before
    for name in made:
        np.testing.assert_array_equal(labels(root / name), TRAIN_IDS)
    out = capsys.readouterr().out
    assert 'dummies' in out
    assert out.splitlines()[-1] == (
        f'{root}: 3 label files written, 1 images without labels right, '
        '0 problems')


def test_cityscapes_keeps_what_official_scripts_made(tmp_path, capsys):
    root = write_cityscapes(tmp_path)
    stem = root / 'gtFine/train/aachen/aachen_000000_000019_gtFine_'
    write_palette(Path(f'{stem}labelTrainIds.png'), TRAIN_IDS)
    other = str(stem).replace('aachen', 'bochum')
    wrong = TRAIN_IDS.copy()
    wrong[2, 3] = 18
    write_grey(Path(f'{other}labelTrainIds.png'), wrong)
    # without the original, by itself
    third = str(stem).replace('train/', 'val/').replace('aachen', 'munster')
    Path(f'{third}labelIds.png').unlink()
    write_grey(Path(f'{third}labelTrainIds.png'), TRAIN_IDS)
    before = files(root)
    assert run('cityscapes', root) == 1
    assert files(root) == before
    out = capsys.readouterr()
    line, = out.err.splitlines()
    assert line.startswith(f'{other}labelTrainIds.png: is not what ')
    assert '1 already there and right, 1 shipped label files right, ' in (
        out.out.splitlines()[-1])


def test_acdc(tmp_path, capsys):
    root = write_acdc(tmp_path)
    before = files(root)
    assert run('acdc', root) == 0
    assert files(root) == before
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{root}: 8 shipped label files right, 4 images without labels '
        'right, 0 problems')


def test_acdc_with_faults(tmp_path, capsys):
    root = write_acdc(tmp_path)

    def gt(condition: str, kind: str) -> Path:
        return root / (f'gt/{condition}/train/GOPR0475/'
                       f'GOPR0475_frame_000041_gt_{kind}.png')

    gt('fog', 'labelTrainIds').unlink()  # only labelIds: made from them
    wrong = TRAIN_IDS.copy()
    wrong[0, 0] = 19
    write_grey(gt('night', 'labelTrainIds'), wrong)
    gt('rain', 'labelTrainIds').unlink()
    gt('rain', 'labelIds').unlink()
    write_grey(gt('snow', 'labelTrainIds'), TRAIN_IDS[:-1])
    image = root / ('rgb_anon/fog/test/GOPR0475/'
                    'GOPR0475_frame_000041_rgb_anon.png')
    image.write_bytes(image.read_bytes()[:60])
    assert run('acdc', root) == 1
    np.testing.assert_array_equal(labels(gt('fog', 'labelTrainIds')),
                                  TRAIN_IDS)
    out = capsys.readouterr()
    lines = out.err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f'{image}: ')
    assert lines[1] == (f'{gt("night", "labelTrainIds")}: holds 19, which is '
                        'no train id (0 to 18 and 255)')
    assert lines[2].endswith('GOPR0475_frame_000041_rgb_anon.png: has no '
                             'label file') and '/rain/train/' in lines[2]
    assert lines[3].startswith(f'{gt("snow", "labelTrainIds")}: 8 x 4 pixels')
    assert lines[3].endswith('has 8 x 5')
    assert out.out.splitlines()[-1] == (
        f'{root}: 1 label files written, 4 shipped label files right, '
        '3 images without labels right, 1 of another size than their image, '
        '3 problems')


def test_dark_zurich(tmp_path, capsys):
    root = write_dark_zurich(tmp_path)
    before = files(root)
    assert run('dark_zurich', root) == 0
    assert files(root) == before
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{root}: 1 shipped label files right, 5 images without labels '
        'right, 0 problems')


def test_nighttime_driving(tmp_path, capsys):
    root = write_nighttime(tmp_path)
    folder = root / 'gtCoarse_daytime_trainvaltest/test/night'
    (folder / '0_frame_0001_gtCoarse_labelTrainIds.png').unlink()
    write_grey(folder / '0_frame_0001_gtCoarse_labelIds.png', CITY_IDS)
    assert run('nighttime_driving', root) == 0
    np.testing.assert_array_equal(
        labels(folder / '0_frame_0001_gtCoarse_labelTrainIds.png'), TRAIN_IDS)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{root}: 1 label files written, 1 shipped label files right, '
        '0 problems')


# -- bad files ------------------------------------------------------------
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    """One bit inside the compressed pixels."""
    content = bytearray(path.read_bytes())
    content[content.index(b'IDAT') + 14] ^= 4
    path.write_bytes(content)


def unknown(path: Path) -> None:
    ids = IDS.copy()
    ids[1, 1] = 35
    write_palette(path, ids)


@pytest.mark.parametrize('folder', ['images', 'labels'])
@pytest.mark.parametrize('damage, text', [
    (cut, ''), (lambda p: p.write_bytes(b''), 'Unidentified'),
    (lambda p: p.write_bytes(b'<html>'), 'Unidentified'),
    (Path.unlink, 'has no ')])
def test_damaged_files(tmp_path, capsys, folder, damage, text):
    root = write_gta(tmp_path)
    bad = root / folder / '00002.png'
    damage(bad)
    before = files(root)
    assert run('gta', root) == 1
    assert set(files(root)) - set(before) == {
        'labels/00001_labelTrainIds.png', 'labels/00003_labelTrainIds.png',
        'pairs.txt'}
    assert (root / 'pairs.txt').read_text() == '00001\n00003\n'
    out = capsys.readouterr()
    line, = out.err.splitlines()
    assert '00002.png: ' in line and text in line
    if damage is not Path.unlink:
        assert line.startswith(str(bad))
    assert out.out.splitlines()[-1] == (
        f'{root}: 2 label files written, 1 problems')


@pytest.mark.parametrize('damage, text', [
    (flip, 'broken PNG'), (unknown, 'unknown ids, the first is 35'),
    (write_image, 'mode RGB'),
    (lambda p: Image.fromarray(IDS).save(p, format='JPEG'), 'Unidentified'),
    (lambda p: write_synthia(p, IDS), 'mode RGB')])
def test_labels_of_another_kind(tmp_path, capsys, damage, text):
    root = write_gta(tmp_path)
    damage(root / 'labels/00002.png')
    assert run('gta', root) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f'{root / "labels/00002.png"}: ') and text in line
    assert not (root / 'labels/00002_labelTrainIds.png').exists()


@pytest.mark.parametrize('damage, text', [
    (cut, ''), (flip, 'broken PNG'), (write_image, 'uint8 is none of'),
    (lambda p: write_grey(p, IDS), 'mode L'),
    (lambda p: write_synthia(p, np.full((H, W), 23)), 'the first is 23'),
    (lambda p: write_synthia(p, np.full((H, W), 600)), 'the first is 600')])
def test_synthia_labels_of_another_kind(tmp_path, capsys, damage, text):
    root = write_synthia_tree(tmp_path)
    damage(root / 'GT/LABELS/0000001.png')
    assert run('synthia', root) == 1
    line, = capsys.readouterr().err.splitlines()
    assert '0000001.png: ' in line and text in line
    assert sorted(p.name for p in (root / 'GT/LABELS').iterdir()) == [
        '0000000.png', '0000000_labelTrainIds.png', '0000001.png']


def test_sizes_that_differ(tmp_path, capsys):
    """In GTA5 a fact of the release, elsewhere a problem."""
    root = write_gta(tmp_path / 'gta')
    write_palette(root / 'labels/00003.png', IDS[:-1])
    assert run('gta', root) == 0
    assert (root / 'pairs.txt').read_text() == '00001\n00002\n'
    assert not (root / 'labels/00003_labelTrainIds.png').exists()
    out = capsys.readouterr()
    assert out.err == (f'{root}/labels/00003.png: 8 x 4 pixels, but '
                       f'{root}/images/00003.png has 8 x 5\n')
    assert '1 of another size than their image, 0 problems' in out.out
    root = write_synthia_tree(tmp_path / 'synthia')
    write_synthia(root / 'GT/LABELS/0000000.png', IDS[:-1] % 23)
    assert run('synthia', root) == 1


# -- restart --------------------------------------------------------------
def test_a_second_run_writes_only_what_is_missing(tmp_path, capsys):
    root = write_gta(tmp_path)
    assert run('gta', root) == 0
    first = files(root)
    before = times(root)
    gone = root / 'labels/00002_labelTrainIds.png'
    gone.unlink()
    assert run('gta', root) == 0
    assert files(root) == first
    after = {str(p): p.stat().st_mtime_ns for p in root.rglob('*.png')}
    assert {p for p in after if after[p] != before[p]} == {str(gone)}
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{root}: 1 label files written, 2 already there and right, '
        '0 problems')


def test_a_damaged_output_is_named_and_not_overwritten(tmp_path, capsys):
    root = write_gta(tmp_path)
    run('gta', root)
    output = root / 'labels/00002_labelTrainIds.png'
    cut(output)
    before = output.read_bytes()
    capsys.readouterr()
    assert run('gta', root) == 1
    assert output.read_bytes() == before
    assert capsys.readouterr().err.startswith(f'{output}: ')
    assert (root / 'pairs.txt').read_text() == '00001\n00003\n'


@pytest.mark.parametrize('moment', ['write', 'rename'])
def test_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch, capsys,
                                               moment):
    root = write_gta(tmp_path)
    replace, count = os.replace, []

    def interrupted(source, target):
        count.append(target)
        if len(count) == 2:
            assert not os.path.exists(target)
            raise KeyboardInterrupt
        replace(source, target)

    if moment == 'rename':
        monkeypatch.setattr(os, 'replace', interrupted)
    else:
        encode = conversion.cv2.imencode

        def slow(*args):
            count.append(args)
            if len(count) == 2:
                raise KeyboardInterrupt
            return encode(*args)

        monkeypatch.setattr(conversion.cv2, 'imencode', slow)
    assert run('gta', root) == 130
    assert 'interrupted' in capsys.readouterr().err
    assert sorted(p.name for p in (root / 'labels').iterdir()) == [
        '00001.png', '00001_labelTrainIds.png', '00002.png', '00003.png']
    assert not (root / 'pairs.txt').exists()
    monkeypatch.undo()
    before = (root / 'labels/00001_labelTrainIds.png').stat().st_mtime_ns
    assert run('gta', root) == 0
    assert before == (
        root / 'labels/00001_labelTrainIds.png').stat().st_mtime_ns
    assert len(list((root / 'labels').iterdir())) == 6


def many(root: Path, count: int) -> Path:
    write_gta(root, 3)
    for i in range(4, count + 1):
        for folder in ('images', 'labels'):
            os.link(root / folder / '00003.png',
                    root / folder / f'{i:05d}.png')
    return root


@pytest.fixture
def slow_writes(monkeypatch):
    """A forked run takes seconds, however loaded the machine is."""
    write = conversion.write_png
    monkeypatch.setattr(
        conversion, 'write_png',
        lambda path, labels: time.sleep(0.01) or write(path, labels))


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)


def run_as_group(errors: Path, *args: object) -> None:
    os.setsid()
    # a background process of a shell is started with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, 'w')
    status = run(*args)
    sys.stderr.flush()
    os._exit(status)


@pytest.mark.skipif(not hasattr(os, 'setsid'), reason='POSIX alone')
def test_ctrl_c(tmp_path, slow_writes):
    """It reaches the workers too: no traceback, and nothing is lost."""
    root = many(tmp_path / 'gta', 600)
    process = multiprocessing.get_context('fork').Process(
        target=run_as_group,
        args=(tmp_path / 'errors', 'gta', root, '--nproc', '2'))
    process.start()
    wait_for(root / 'labels/00001_labelTrainIds.png')
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    status = process.exitcode
    process.kill()  # a run that hangs must not make the tests hang
    assert status == 130
    assert (tmp_path / 'errors').read_text() == (
        '\ninterrupted: the same command goes on\n')
    names = {p.name for p in (root / 'labels').iterdir()}
    assert not [n for n in names if n.endswith('.tmp')]
    assert 0 < len(names) - 600 < 600


def test_workers_leave_ctrl_c_to_the_main_process():
    """Also where they are spawned, and inherit no handler."""
    context = multiprocessing.get_context('fork')
    with context.Pool(1, conversion._start_worker) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGINT, )) == (
            signal.SIG_IGN)


def children(pid: int) -> list[int]:
    found = Path(f'/proc/{pid}/task/{pid}/children').read_text()
    return [int(word) for word in found.split()]


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='no /proc')
def test_a_killed_run(tmp_path, slow_writes):
    """SIGKILL: workers end, names hold whole files, the next run goes on."""
    root = many(tmp_path / 'gta', 600)
    process = multiprocessing.get_context('fork').Process(
        target=run, args=('gta', root, '--nproc', 2))
    process.start()
    first = root / 'labels/00001_labelTrainIds.png'
    wait_for(first)
    workers = children(process.pid)
    process.kill()
    process.join()
    assert first.exists() and len(workers) == 2
    alive = workers
    for _ in range(100):
        alive = [w for w in workers if Path(f'/proc/{w}').is_dir()
                 and ') Z ' not in Path(f'/proc/{w}/stat').read_text()]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive
    done = list((root / 'labels').glob('*_labelTrainIds.png'))
    assert 0 < len(done) < 600
    for path in done:
        assert labels(path).shape == (H, W)
    leftover = root / 'labels/.00007_labelTrainIds.png.99.tmp'
    leftover.write_bytes(b'half')
    mine = root / 'labels/.notes.tmp'
    mine.write_bytes(b'not ours')
    bad = root / 'labels/00600.png'
    bad.unlink()
    bad.write_bytes(b'bad')
    before = {p: p.stat().st_mtime_ns for p in done}
    # as a command, elsewhere, without an installed package
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    again = subprocess.run(
        [sys.executable, str(TOOLS / 'gta.py'), str(root), '--nproc', '2'],
        cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 1
    assert {p: p.stat().st_mtime_ns for p in done} == before
    assert not leftover.exists() and mine.exists()
    assert len(list((root / 'labels').glob('*_labelTrainIds.png'))) == 599
    assert again.stderr.splitlines()[-1].startswith(f'{bad}: ')
    assert again.stdout.splitlines()[-1] == (
        f'{root}: {599 - len(done)} label files written, {len(done)} '
        'already there and right, 1 problems')


# -- options --------------------------------------------------------------
def test_processes_do_not_matter(tmp_path, capsys):
    for name, nproc in (('one', 1), ('two', 2)):
        root = write_gta(tmp_path / name, 9)
        cut(root / 'labels/00004.png')
        assert run('gta', root, '--nproc', nproc) == 1
    assert files(tmp_path / 'one') == files(tmp_path / 'two')
    assert len(files(tmp_path / 'two')) == 9 * 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].replace('/one/', '/two/') == lines[1]


def test_dry_run(tmp_path, capsys):
    root = write_gta(tmp_path)
    cut(root / 'labels/00002.png')
    before = files(root)
    assert run('gta', root, '--dry-run') == 1
    assert files(root) == before
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'{root} (dry run): 2 label files to write, 1 problems')


def test_out_dir(tmp_path, capsys):
    root, out = write_cityscapes(tmp_path / 'city'), tmp_path / 'out'
    before = files(root)
    assert run('cityscapes', root, '--out-dir', out) == 0
    assert files(root) == before
    assert sorted(files(out)) == [
        f'gtFine/{s}/{c}/{c}_000000_000019_gtFine_labelTrainIds.png'
        for s, c in (('train', 'aachen'), ('train', 'bochum'),
                     ('val', 'munster'))]
    assert run('cityscapes', root, '--out-dir', out) == 0
    assert '3 already there and right' in capsys.readouterr().out
    gta = write_gta(tmp_path / 'gta')
    assert run('gta', gta, '--out-dir', tmp_path / 'gta_out') == 0
    assert sorted(files(tmp_path / 'gta_out')) == [
        'labels/00001_labelTrainIds.png', 'labels/00002_labelTrainIds.png',
        'labels/00003_labelTrainIds.png', 'pairs.txt']
    with pytest.raises(ValueError, match='--out-dir .* lies inside of'):
        run('gta', gta, '--out-dir', gta / 'labels/new')


def test_an_output_that_cannot_be_written(tmp_path):
    root = write_gta(tmp_path / 'gta')
    (tmp_path / 'file').write_text('')
    for nproc in (1, 2):
        with pytest.raises(ValueError, match='cannot write .*/file/labels'):
            run('gta', root, '--out-dir', tmp_path / 'file', '--nproc', nproc)


def test_nproc_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match='--nproc must be at least 1'):
        run('gta', write_gta(tmp_path), '--nproc', 0)


def die(path):
    os._exit(9)


def test_a_worker_that_dies(tmp_path):
    root = write_gta(tmp_path)
    broken = LabelFormat('.png', '_labelTrainIds.png', CITYSCAPES_TRAIN_IDS,
                         known_ids=range(35), read=die)
    with pytest.raises(ValueError, match='worker process was killed'):
        convert(str(root), [Part('images', 'labels')], broken, nproc=2)


# -- wrong folders --------------------------------------------------------
def test_wrong_roots(tmp_path):
    with pytest.raises(ValueError, match='gone does not exist'):
        run('gta', tmp_path / 'gone')
    root = write_gta(tmp_path / 'data/gta')
    with pytest.raises(ValueError, match='does not hold images and labels; '
                       f'did you mean {root}'):
        run('gta', root.parent)
    with pytest.raises(ValueError, match='does not hold RGB and GT/LABELS: '
                       'give the folder that does'):
        run('synthia', root)
    os.rename(root / 'labels', root / 'label')
    with pytest.raises(ValueError, match='gta/images is there, but not .*'
                       'gta/labels'):
        run('gta', root)
    (tmp_path / 'empty/images').mkdir(parents=True)
    (tmp_path / 'empty/labels').mkdir()
    with pytest.raises(ValueError, match=r'empty/images holds no file \*'):
        run('gta', tmp_path / 'empty')


def test_parts_may_be_absent(tmp_path, capsys):
    root = tmp_path / 'acdc'
    stem = 'fog/val/GOPR0476/GOPR0476_frame_000001'
    write_image(root / f'rgb_anon/{stem}_rgb_anon.png')
    write_grey(root / f'gt/{stem}_gt_labelTrainIds.png', TRAIN_IDS)
    assert run('acdc', root) == 0
    assert '1 shipped label files right, 0' in capsys.readouterr().out


@pytest.mark.parametrize('tool', sorted(p.stem for p in TOOLS.glob('*.py')))
def test_mistakes_in_one_sentence(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [tool, str(tmp_path / 'nowhere')])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOLS / f'{tool}.py'), run_name='__main__')
    assert caught.value.code == 1
    assert f'error: the folder {tmp_path}/nowhere does not exist' in (
        capsys.readouterr().err)


@pytest.mark.parametrize('tool, write', [
    ('gta', write_gta), ('synthia', write_synthia_tree),
    ('cityscapes', write_cityscapes), ('acdc', write_acdc),
    ('dark_zurich', write_dark_zurich),
    ('nighttime_driving', write_nighttime)])
def test_default_root_is_the_documented_one(tool, write, tmp_path,
                                            monkeypatch):
    guide = (TOOLS.parents[1] / 'docs/datasets.md').read_text()
    root, = re.findall(rf'dataset_converters/{tool}.py (data/\S+)', guide)
    write(tmp_path / root)
    monkeypatch.chdir(tmp_path)
    assert run(tool) == 0


def test_indices_not_colours(tmp_path):
    write_palette(tmp_path / 'a.png', IDS)
    np.testing.assert_array_equal(read_indices(str(tmp_path / 'a.png')), IDS)
