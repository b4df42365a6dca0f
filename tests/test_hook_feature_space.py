"""PCA, t-SNE, and pictures of embeddings by hook and by tool."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS

from datasets_common import streets
from helpers import batch, build, dacs_parts, tiny_student
from mmseg_contrast.engine.feature_plot import (
    Cloud,
    balanced_pixels,
    draw_features,
    project,
)
from mmseg_contrast.engine.hooks import FeatureSpaceHook
from mmseg_contrast.engine.hooks.feature_space import (
    Batch,
    draw,
    embed,
    find_head,
)
from mmseg_contrast.engine.hooks.panel import default_palette
from mmseg_contrast.engine.looking import glance, untouched
from mmseg_contrast.engine.projection import (
    joint_probabilities,
    kl_divergence,
    kl_gradient,
    pca,
    squared_distances,
    tsne,
)

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ['road', 'car', 'sky', 'traffic light', 'train']
PALETTE = np.array([[200, 0, 0], [0, 160, 0], [0, 0, 250], [200, 160, 0],
                    [0, 160, 160]], np.uint8)


def points(number=30, width=5, seed=0):
    return np.random.RandomState(seed).randn(number, width)


# -- the plane ---------------------------------------------------------------


def test_pca_are_the_eigenvectors_of_the_covariance():
    data = points() * [5, 1, 3, .5, 2] + 7
    axes = pca(data)
    values, vectors = np.linalg.eigh(np.cov(data.T))
    for k in range(2):
        vector = vectors[:, -1 - k]
        vector *= np.sign(vector[np.abs(vector).argmax()])
        np.testing.assert_allclose(axes.directions[k], vector, atol=1e-10)
        assert axes.shares[k] == pytest.approx(values[-1 - k] / values.sum())
    plane = axes.project(data)
    np.testing.assert_allclose(plane.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(
        plane.var(0, ddof=1), values[[-1, -2]], rtol=1e-10)
    # mirrored data gives a mirrored plane, no mirrored axes
    np.testing.assert_allclose(pca(14 - data).project(14 - data), -plane,
                               atol=1e-9)


@pytest.mark.parametrize('data', [
    np.zeros((1, 3)), np.ones((4, 3)), np.arange(4.).reshape(4, 1)],
    ids=['one', 'equal', 'line'])
def test_pca_of_too_little(data):
    axes = pca(data)
    assert axes.directions.shape == (2, data.shape[1])
    assert np.isfinite(axes.project(data)).all()
    assert (axes.shares[1] == 0) and axes.shares.sum() <= 1 + 1e-12


def test_neighbours_have_the_perplexity():
    data = points(40)
    distances = squared_distances(data)
    for i, j in ((0, 1), (3, 20)):
        assert distances[i, j] == pytest.approx(
            ((data[i] - data[j])**2).sum())
    likely = joint_probabilities(distances, 7.)
    assert likely.sum() == pytest.approx(1)
    assert (likely == likely.T).all() and (np.diag(likely) == 0).all()
    # one vector by itself, by a search over the width
    expected = np.zeros((40, 40))
    for i in range(40):
        others = np.arange(40) != i
        low, high = 0., 1e6
        for _ in range(200):
            middle = (low + high) / 2
            share = np.zeros(40)
            share[others] = np.exp(-middle * (
                distances[i, others] - distances[i, others].min()))
            share /= share.sum()
            entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
            low, high = (middle, high) if entropy > math.log(7) else (
                low, middle)
        expected[i] = share
    np.testing.assert_allclose(likely, (expected + expected.T) / 80,
                               atol=1e-10)


def test_gradient_of_tsne_against_differences():
    likely = joint_probabilities(squared_distances(points(12)), 3.)
    plane = points(12, 2, seed=1)
    gradient = kl_gradient(likely, plane)
    for i in range(12):
        for k in range(2):
            values = []
            for step in (1e-5, -1e-5):
                moved = plane.copy()
                moved[i, k] += step
                values.append(kl_divergence(likely, moved))
            assert gradient[i, k] == pytest.approx(
                (values[0] - values[1]) / 2e-5, abs=1e-8)


def two_clusters(number=60, width=10):
    data = points(number, width)
    data[number // 2:, 0] += 30
    return data


def test_tsne_keeps_clusters_apart_and_the_divergence_falls():
    data = two_clusters()
    likely = joint_probabilities(squared_distances(data), 19.)
    values = [kl_divergence(likely, tsne(data, 19., iterations=n))
              for n in (1, 130, 400)]
    # at first all points are one, which costs more than any good map
    assert values[0] > 3 * values[2] and values[1] > 1.2 * values[2]
    plane = tsne(data, 19., iterations=400)
    assert (plane == tsne(data, 19., iterations=400)).all()
    one, two = plane[:30], plane[30:]
    between = np.linalg.norm(one.mean(0) - two.mean(0))
    within = max(np.linalg.norm(part - part.mean(0), axis=1).max()
                 for part in (one, two))
    assert between > 2 * within
    np.testing.assert_allclose(plane.mean(0), 0, atol=1e-9)


def test_early_exaggeration_holds_the_map_together():
    def extent(exaggeration):
        return np.abs(tsne(two_clusters(), 19., 100, exaggeration, 100,
                           5.)).max()

    assert extent(12.) < 0.5 * extent(1.)


def test_looking_leaves_random_states_and_modes():
    model = build()
    model.segmentor.backbone.layers[0][1].eval()
    modes = [part.training for part in model.modules()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(),
              random.getstate())
    for error in (None, ValueError):
        try:
            with untouched(model, 3):
                drawn = torch.rand(2), np.random.rand(), random.random()
                assert not any(part.training for part in model.modules())
                assert not torch.is_grad_enabled()
                if error:
                    raise error
        except ValueError:
            pass
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()
        assert random.getstate() == states[2]
        assert modes == [part.training for part in model.modules()]
        assert torch.is_grad_enabled() and drawn


@pytest.mark.parametrize('number', [0, 1, 3, 4, 6])
def test_tsne_of_few_or_equal_points(number):
    plane = tsne(points(number), iterations=30)
    assert plane.shape == (number, 2) and np.isfinite(plane).all()
    equal = tsne(np.ones((number, 3)), iterations=30)
    assert equal.shape == (number, 2) and np.isfinite(equal).all()
    twins = tsne(np.repeat(points(8), 2, 0), iterations=300)
    assert np.isfinite(twins).all()
    np.testing.assert_allclose(twins[::2], twins[1::2], atol=1e-6)


def test_bad_arguments():
    for options in (dict(perplexity=0.5), dict(iterations=0),
                    dict(exaggeration=0.5)):
        with pytest.raises(ValueError, match='tsne needs'):
            tsne(points(), **options)
    with pytest.raises(ValueError, match='pca needs'):
        pca(np.zeros((0, 3)))


# -- the picture -------------------------------------------------------------


def test_pixels_are_drawn_evenly_over_classes():
    labels = np.repeat([0, 1, 2, 255, -1], [500, 20, 3, 100, 50])
    chosen = balanced_pixels(labels, 30, 5, 0)
    assert len(set(chosen)) == 30
    assert np.bincount(labels[chosen]).tolist() in (
        [14, 13, 3], [13, 14, 3])
    assert (balanced_pixels(labels, 30, 5, 0) == chosen).all()
    assert (balanced_pixels(labels, 30, 5, 1) != chosen).any()
    all_of_them = balanced_pixels(labels, 9999, 5, 0)
    assert sorted(all_of_them) == list(range(523))
    assert balanced_pixels(np.array([255]), 5, 5, 0).size == 0


def clouds(classes=3, number=120):
    data = []
    for name, shift in (('source', 0.), ('target', 6.)):
        labels = np.arange(number) % classes
        vectors = np.eye(8)[labels] * 5 + 0.5 * points(number, 8)
        vectors[:, 7] += shift
        data.append(Cloud(f'{name} (labels)', vectors, labels))
    return data


@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_all_vectors_come_into_one_plane(method):
    data, prototypes = clouds(), np.eye(8)[:3] * 5
    plane, stars, names = project(data, prototypes, method)
    assert [one.shape for one in plane] == [(120, 2)] * 2
    for c in range(3):  # a prototype lies where its class is
        centres = [plane[0][data[0].labels == k].mean(0)
                   for k in range(3)]
        nearest = [np.linalg.norm(stars[c] - centre) for centre in centres]
        assert int(np.argmin(nearest)) == c
    assert ('%' in names[0]) == (method == 'pca')
    if method == 'pca':
        together = np.concatenate([one.vectors for one in data])
        np.testing.assert_allclose(plane[1], pca(together).project(
            data[1].vectors))
    with pytest.raises(ValueError, match="'umap' must be one of"):
        project(data, prototypes, 'umap')


def area(image, color):
    return int((image == color).all(-1).sum())


def test_a_picture_has_all_colours_and_shared_axes():
    data = clouds()
    image = draw_features(data, np.eye(8)[:3] * 5, np.arange(3), CLASSES,
                          PALETTE, title='features of aux, iteration 8')
    assert image.dtype == np.uint8 and image.ndim == 3
    assert image[0, 0].tolist() == [255] * 3
    for c in range(3):
        assert area(image, PALETTE[c]) > 100
    assert area(image, PALETTE[3]) == area(image, PALETTE[4]) == 0
    # both panels show the same place: the other view's points lie behind
    assert area(image, [0xdd] * 3) > 1000
    one = draw_features(data[:1], np.zeros((0, 8)), np.zeros(0, int),
                        CLASSES, PALETTE)
    assert one.shape[1] < image.shape[1]
    assert area(one, [0xdd] * 3) < 50
    # without its star, a class has less of its colour
    without = draw_features(data, np.zeros((0, 8)), np.zeros(0, int),
                            CLASSES, PALETTE)
    assert area(without, PALETTE[0]) < area(image, PALETTE[0])


def test_many_classes_and_degenerate_clouds():
    labels = np.arange(300) % 150
    many = draw_features([Cloud('a', points(300), labels)], points(150),
                         np.arange(150), [f'class {c}' for c in range(150)],
                         default_palette(150))
    assert many.shape[1] > 1500
    flat = draw_features([Cloud('a', np.ones((2, 3)), np.zeros(2, int))],
                         np.zeros((0, 3)), np.zeros(0, int), CLASSES, PALETTE)
    assert flat.shape[0] < 900
    with pytest.raises(ValueError, match='no labelled pixel'):
        draw_features([Cloud('a', np.zeros((0, 3)), np.zeros(0, int))],
                      np.zeros((0, 3)), np.zeros(0, int), CLASSES, PALETTE)


# -- what is drawn -----------------------------------------------------------


def student(contrast=True, **options):
    config = tiny_student()
    if contrast:
        config['auxiliary_head'] = dict(
            dict(type='ContrastHead', in_channels=8, in_index=1,
                 num_classes=5, channels=6, projection=dict(layers=1),
                 bank=dict(type='PrototypeBank')), **options)
    return config


def adapting(contrast=True, **options):
    parts = dacs_parts()
    if contrast:
        parts['objectives']['contrast'] = dict(type='Contrast')
    return build(student(contrast, **options), **parts)


@pytest.mark.parametrize('features', ['backbone', 'decoder', 'logits'])
def test_embeddings_are_those_of_the_head(features):
    torch.manual_seed(0)
    net = MODELS.build(student(
        features=features, in_channels=5 if features == 'logits' else 8))
    head = net.auxiliary_head
    images = torch.randn(2, 3, 32, 32)
    labels = torch.randint(0, 5, (2, 32, 32))
    with untouched(net):
        stages = net.extract_feat(images)
        decoder = net.decode_head._forward_feature(stages)
        given = dict(backbone=stages, decoder=[decoder],
                     logits=[net.decode_head.cls_seg(decoder)])[features]
        maps = head.project(given)
        cloud = embed(net, head, Batch('x', images, labels, 'labels'), 9999,
                      5, 0)
    assert cloud.title == 'x (labels)'
    small = F.interpolate(labels[:, None].float(), maps.shape[2:])
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    distances = ((cloud.vectors[:, None] - rows)**2).sum(2)
    pixel = distances.argmin(1)
    assert sorted(pixel) == list(range(len(rows)))
    assert distances.min(1).max() < 1e-10
    assert (small.flatten().long().numpy()[pixel] == cloud.labels).all()


def test_without_labels_colours_are_predictions_inside_the_image():
    torch.manual_seed(0)
    net = MODELS.build(student(False))
    images = torch.randn(1, 3, 32, 32)
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    valid[:, :, 16:] = False
    with untouched(net):
        cloud = embed(net, None, Batch('x', images, valid=valid), 999, 5, 0)
        seen = glance(net, images, True)
    expected = seen.probabilities.argmax(1)[:, ::4, ::4][:, :, :4]
    assert len(cloud.labels) == 32
    assert np.bincount(cloud.labels, minlength=5).tolist() == (
        expected.flatten().bincount(minlength=5).tolist())
    assert cloud.vectors.shape[1] == 8
    assert cloud.title == 'x (predicted)'


def test_names_of_heads():
    model = adapting()
    head = model.segmentor.auxiliary_head
    assert find_head(model, None, 'x') == ('aux', head)
    assert find_head(model, 'backbone', 'x') == ('backbone', None)
    assert find_head(build(), None, 'x') == ('backbone', None)
    with pytest.raises(ValueError, match=r"'aux_1'.*\['aux'\].*'backbone'"):
        find_head(model, 'aux_1', 'x')


# -- the hook ----------------------------------------------------------------


class Visualizer:
    def __init__(self):
        self.images = {}

    def add_image(self, name, image, step):
        self.images[name, step] = image


def fake_runner(model, folder):
    meta = dict(classes=CLASSES, palette=PALETTE.tolist())
    return SimpleNamespace(
        model=model, iter=0, work_dir=str(folder), visualizer=Visualizer(),
        train_dataloader=SimpleNamespace(
            dataset=SimpleNamespace(metainfo=meta)))


def train(runner, hook, iterations, data):
    hook.before_train(runner)
    model = runner.model
    kept = []
    for runner.iter in range(iterations):
        hook.before_train_iter(runner, runner.iter, data)
        kept.append(getattr(model, 'keep_step', None))
        done = model.data_preprocessor(data, True)
        model(**done, mode='loss')
        hook.after_train_iter(runner, runner.iter, data)
    return kept


def test_the_hook_draws_source_and_target(tmp_path):
    model = adapting()
    runner = fake_runner(model, tmp_path)
    kept = train(runner, FeatureSpaceHook(interval=2, first=True), 4, batch())
    assert kept == [True, True, False, True]
    assert not model.keep_step
    files = sorted((tmp_path / 'feature_space').iterdir())
    assert [f.name for f in files] == [
        f'iter_00000{i}.png' for i in (1, 2, 4)]
    assert set(runner.visualizer.images) == {
        ('feature_space', i) for i in (1, 2, 4)}
    image = runner.visualizer.images['feature_space', 4]
    on_disk = cv2.cvtColor(cv2.imread(str(files[2])), cv2.COLOR_BGR2RGB)
    assert (image == on_disk).all()
    assert image.shape[1] > 1000  # two panels
    held = model.segmentor.auxiliary_head.bank.centres()[1]
    assert held.all() and area(image, PALETTE[4]) > 100


def test_a_view_that_isnt_there_is_left_out(tmp_path):
    runner = fake_runner(adapting(), tmp_path)
    train(runner, FeatureSpaceHook(interval=1, views=['source', 'night']), 1,
          batch())
    assert runner.visualizer.images['feature_space', 1].shape[1] < 1000


def test_a_stock_model_and_its_backbone(tmp_path):
    torch.manual_seed(0)
    model = MODELS.build(student(False)).train()
    runner = fake_runner(model, tmp_path)
    data = batch()
    data = dict(inputs=data['inputs']['source'],
                data_samples=data['data_samples']['source'])
    # preprocessing pads images and labels; the hook does so once more
    data['inputs'] = [one[:, :24] for one in data['inputs']]
    for one in data['data_samples']:
        one.gt_sem_seg = PixelData(data=one.gt_sem_seg.data[:, :24])
    train(runner, FeatureSpaceHook(interval=1), 1, data)
    assert runner.visualizer.images['feature_space', 1].shape[1] < 1000


def test_the_hook_leaves_no_trace(tmp_path):
    model = adapting()
    runner = fake_runner(model, tmp_path)
    hook = FeatureSpaceHook(interval=1)
    hook.before_train_iter(runner, 0)
    data = model.data_preprocessor(batch(), True)
    model(**data, mode='loss')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(),
              random.getstate())
    hook.after_train_iter(runner, 0)
    assert runner.visualizer.images
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert modes == [part.training for part in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    # gone before the next forward pass
    hook.before_train_iter(runner, 1)
    assert model.last_step is None


def test_nothing_is_drawn_of_nothing():
    net = MODELS.build(student(False))
    images = torch.zeros(1, 3, 32, 32)
    labels = torch.full((1, 32, 32), 255)
    assert draw(net, None, None, [Batch('x', images, labels)], 10, CLASSES,
                PALETTE, 'pca', '', 0) is None


@pytest.mark.parametrize('key, value', [
    ('method', 'umap'), ('views', 'source'), ('views', []), ('interval', 0),
    ('pixels', 1)])
def test_bad_arguments_name_their_key(key, value):
    with pytest.raises(ValueError, match=f'FeatureSpaceHook.{key}'):
        FeatureSpaceHook(**{key: value})


# -- the tool ----------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch):
    path = ROOT / 'tools/analysis_tools/plot_feature_space.py'
    spec = importlib.util.spec_from_file_location('plot_feature_space', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['tool', *map(str, arguments)])
        module.main()

    return call


def test_the_tool(tool, tmp_path):
    crop = dict(type='RandomCrop', crop_size=(32, 32))
    net = tiny_student(10)
    net['auxiliary_head'] = dict(
        student()['auxiliary_head'], num_classes=10)
    parts = dacs_parts()
    parts['objectives']['contrast'] = dict(type='Contrast')
    # the validation images are no multiple of 32: they are padded
    net['data_preprocessor']['test_cfg'] = dict(size_divisor=32)
    config = dict(
        default_scope='mmseg',
        model=dict(type='UDASegmentor', segmentor=net, **parts),
        train_dataloader=dict(dataset=dict(
            type='StreamDataset', streams=dict(
                source=dict(dataset=streets('source', 3, crop)),
                target=dict(dataset=streets('target', 3, crop, labels=False),
                            labelled=False)))),
        val_dataloader=dict(dataset=dict(
            streets('target', 3), size=(72, 40))))
    file, weights = tmp_path / 'config.py', tmp_path / 'some.pth'
    file.write_text('\n'.join(f'{k} = {v!r}' for k, v in config.items()))
    model = build(net, **parts)
    model.segmentor.auxiliary_head.bank.update(
        torch.eye(6), torch.arange(6))
    torch.save(dict(state_dict=model.state_dict()), weights)

    def picture(name, *arguments):
        tool(file, weights, '--out', tmp_path / name, '--device', 'cpu',
             '--pixels', 300, *arguments)
        return cv2.imread(str(tmp_path / name))

    both = picture('both.png')
    assert both.shape[1] > 1000
    one = picture('deep/one.png', '--views', 'val', '--method', 'tsne',
                  '--teacher', 'ema', '--images', 2)
    assert one.shape[1] < 1000
    for arguments, words in (
            (['--views', 'night'], "night.*'source', 'target', 'val'"),
            (['--teacher', 'mean'], '--teacher mean'),
            (['--head', 'aux_1'], r"--head = 'aux_1'.*\['aux'\]")):
        with pytest.raises(ValueError, match=words):
            picture('no.png', *arguments)
    assert not (tmp_path / 'no.png').exists()
    assert Config.fromfile(str(file)).default_scope == 'mmseg'
