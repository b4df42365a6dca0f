"""IoU of any field, against mmseg's and an explicit confusion matrix."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.datasets import CityscapesDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_contrast.evaluation import FieldIoUMetric
from mmseg_contrast.evaluation.subsets import SYNTHIA_13, SYNTHIA_16

CITYSCAPES = CityscapesDataset.METAINFO['classes']
CLASSES = ('road', 'sky', 'car', 'train', 'tram')


def samples(seed=0, number=3):
    """Labels of classes 0 to 2, predictions of 0 to 3: 'tram' is nowhere."""
    rng = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        label = torch.randint(0, 3, (1, 7, 9), generator=rng)
        label[torch.rand(1, 7, 9, generator=rng) < 0.2] = 255
        result.append({
            'gt_sem_seg': {'data': label},
            'pred_sem_seg': {
                'data': torch.randint(0, 4, (1, 7, 9), generator=rng)},
            'teacher_pred_sem_seg': {
                'data': torch.randint(0, 2, (1, 7, 9), generator=rng)}})
    return result


def evaluate(metric, data, classes=CLASSES):
    metric.dataset_meta = dict(classes=classes)
    for sample in data:  # several batches
        metric.process({}, [sample])
    return metric.evaluate(len(data))


def loop_iou(data, field='pred_sem_seg', classes=CLASSES):
    """IoU in percent of every class, nan for one that is nowhere."""
    matrix = [[0] * len(classes) for _ in classes]
    for sample in data:
        truth = sample['gt_sem_seg']['data'].flatten().tolist()
        guess = sample[field]['data'].flatten().tolist()
        for t, g in zip(truth, guess, strict=True):
            if t != 255:
                matrix[t][g] += 1
    result = []
    for c in range(len(classes)):
        union = sum(matrix[c]) + sum(row[c] for row in matrix) - matrix[c][c]
        result.append(100 * matrix[c][c] / union if union else math.nan)
    return result


@pytest.mark.parametrize('field', ['pred_sem_seg', 'teacher_pred_sem_seg'])
def test_iou_of_every_class_against_a_loop(field):
    data = samples()
    result = evaluate(FieldIoUMetric(field=field), data)
    expected = loop_iou(data, field)
    seen = [v for v in expected if not math.isnan(v)]
    assert result['mIoU'] == pytest.approx(sum(seen) / len(seen), abs=0.006)
    named = {f'IoU.{c}': v for c, v in zip(CLASSES, expected, strict=True)
             if not math.isnan(v)}
    assert 'IoU.tram' not in named
    got = {k: v for k, v in result.items() if k.startswith('IoU.')}
    assert got == {k: pytest.approx(v, abs=0.006) for k, v in named.items()}
    assert all(type(v) is float and v == round(v, 2) for v in got.values())


@pytest.mark.parametrize('extra', [
    {}, dict(nan_to_num=0), dict(iou_metrics=['mIoU', 'mDice', 'mFscore']),
    dict(ignore_index=1)])
def test_otherwise_equal_to_mmseg(extra):
    data = samples(1)
    if extra.get('ignore_index') == 1:  # 255 would be out of range for both
        for sample in data:
            label = sample['gt_sem_seg']['data']
            label[label == 255] = 1
    ours = evaluate(FieldIoUMetric(per_class=False, **extra), data)
    stock = evaluate(IoUMetric(**extra), data)
    assert ours == stock
    both = evaluate(FieldIoUMetric(**extra), data)
    assert {k: both[k] for k in stock} == stock
    assert 'IoU.tram' not in both and 'IoU.train' in both


def test_prefix_and_registry():
    metric = METRICS.build(dict(
        type='FieldIoUMetric', field='teacher_pred_sem_seg',
        prefix='teacher'))
    result = evaluate(metric, samples())
    assert {'teacher/mIoU', 'teacher/aAcc', 'teacher/IoU.road'} <= set(result)
    assert not any(not key.startswith('teacher/') for key in result)


def test_the_students_field_is_left_alone():
    data = samples()
    before = data[0]['pred_sem_seg']['data'].clone()
    evaluate(FieldIoUMetric(field='teacher_pred_sem_seg'), data)
    assert torch.equal(data[0]['pred_sem_seg']['data'], before)


def test_missing_field_names_the_config_key():
    data = samples()
    del data[1]['teacher_pred_sem_seg']
    metric = FieldIoUMetric(field='teacher_pred_sem_seg')
    metric.dataset_meta = dict(classes=CLASSES)
    with pytest.raises(ValueError, match='model.predict_with'):
        metric.process({}, data)
    assert metric.results == []


def test_format_only_writes_the_field(tmp_path):
    import cv2
    sample = samples()[0]
    sample['img_path'] = 'somewhere/town.jpg'
    metric = FieldIoUMetric(
        field='teacher_pred_sem_seg', output_dir=str(tmp_path),
        format_only=True)
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, [sample])
    written = cv2.imread(str(tmp_path / 'town.png'), cv2.IMREAD_UNCHANGED)
    expected = sample['teacher_pred_sem_seg']['data'][0].numpy()
    assert (written == expected).all()
    assert metric.compute_metrics([]) == {}


def test_the_key_that_stock_tools_set_with_out_is_known():
    assert METRICS.build(dict(type='FieldIoUMetric', keep_results=True))


def one(label, guess):
    """A sample of the given rows of class ids."""
    return {'gt_sem_seg': {'data': torch.tensor(label)[None]},
            'pred_sem_seg': {'data': torch.tensor(guess)[None]}}


def street(predicted, labelled=tuple(range(19)), seed=0):
    """Random labels and predictions of the given Cityscapes classes."""
    rng = torch.Generator().manual_seed(seed)

    def draw(ids):
        return torch.tensor(ids)[
            torch.randint(len(ids), (40, 50), generator=rng)]

    label, guess = draw(labelled), draw(predicted)
    # Half of what can be right is right, or all IoUs would be tiny.
    right = torch.isin(label, torch.tensor(predicted)) & (
        torch.rand(40, 50, generator=rng) < 0.5)
    label[:2] = 255
    return [one(label.tolist(), torch.where(right, label, guess).tolist())]


def mean(values):
    seen = [v for v in values if not math.isnan(v)]
    return sum(seen) / len(seen)


def test_synthias_classes():
    out = [c for c in CITYSCAPES if c not in SYNTHIA_16]
    assert [CITYSCAPES.index(c) for c in out] == [9, 14, 16]
    out = [c for c in CITYSCAPES if c not in SYNTHIA_13]
    assert [CITYSCAPES.index(c) for c in out] == [3, 4, 5, 9, 14, 16]
    assert (len(SYNTHIA_16), len(SYNTHIA_13)) == (16, 13)


def test_subset_equals_the_published_rule_where_that_holds():
    """Mean over 19 times 19/16, while the three IoUs are 0."""
    subsets = dict(mIoU16='synthia16', mIoU13='synthia13')
    kept = [i for i in range(19) if i not in (9, 14, 16)]

    # SYNTHIA's classes predicted, all of Cityscapes' labelled.
    data = street(predicted=kept)
    result = evaluate(
        FieldIoUMetric(class_subsets=subsets), data, CITYSCAPES)
    assert result['IoU.terrain'] == result['IoU.train'] == 0
    assert result['mIoU16'] == pytest.approx(
        result['mIoU'] * 19 / 16, abs=0.02)
    assert result['mIoU16'] > result['mIoU'] + 1

    # Also predicted: their IoUs aren't 0, and the rule would be wrong.
    data = street(predicted=range(19))
    result = evaluate(
        FieldIoUMetric(class_subsets=subsets), data, CITYSCAPES)
    ious = loop_iou(data, classes=CITYSCAPES)
    assert result['mIoU16'] == pytest.approx(
        mean([ious[i] for i in kept]), abs=0.006)
    assert abs(result['mIoU16'] - result['mIoU'] * 19 / 16) > 1

    # Nowhere: their IoUs are nan, left out of the mean over all as well.
    data = street(predicted=kept, labelled=kept)
    result = evaluate(
        FieldIoUMetric(class_subsets=subsets), data, CITYSCAPES)
    assert 'IoU.terrain' not in result
    assert result['mIoU16'] == result['mIoU']
    ious = loop_iou(data, classes=CITYSCAPES)
    assert result['mIoU13'] == pytest.approx(
        mean([ious[i] for i in kept if i not in (3, 4, 5)]), abs=0.006)
    assert result['mIoU13'] != result['mIoU16']


def test_classes_outside_of_the_subset_still_make_errors():
    # road: 2 right, 1 lost to tram, 1 taken from tram
    data = [one([[0, 0, 0, 4]], [[0, 0, 4, 0]])]
    result = evaluate(
        FieldIoUMetric(class_subsets=dict(road=['road'])), data)
    assert result['road'] == 50


def test_subsets_by_name_and_id_and_absent_classes():
    data = samples()
    ious = loop_iou(data)
    assert math.isnan(ious[4]) and not math.isnan(ious[3])
    subsets = dict(
        mixed=['sky', 3], with_absent=[0, 4], absent=['tram'],
        every=list(CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = evaluate(FieldIoUMetric(class_subsets=subsets), data)
    assert result['mixed'] == pytest.approx(
        (ious[1] + ious[3]) / 2, abs=0.006)
    assert result['with_absent'] == pytest.approx(ious[0], abs=0.006)
    assert math.isnan(result['absent'])
    assert result['every'] == result['mIoU']
    result = evaluate(FieldIoUMetric(
        class_subsets=subsets, nan_to_num=0, per_class=False), data)
    assert result['with_absent'] == pytest.approx(ious[0] / 2, abs=0.006)
    assert result['absent'] == 0
    assert result['every'] == result['mIoU']
    assert 'IoU.road' not in result
    assert type(result['every']) is float


@pytest.mark.parametrize('subsets,words', [
    (['road'], 'must be a dict'),
    (dict(mIoU16='synthia17'), "did you mean 'synthia16'"),
    (dict(mIoU16=[]), 'at least one class'),
    (dict(mIoU16=16), 'at least one class'),
    (dict(mIoU=['road']), 'name of another result'),
    ({'IoU.road': ['road']}, 'name of another result'),
])
def test_mistakes_in_subsets_seen_at_once(subsets, words):
    with pytest.raises(ValueError, match=words) as error:
        FieldIoUMetric(class_subsets=subsets)
    assert 'FieldIoUMetric.class_subsets' in str(error.value)


@pytest.mark.parametrize('classes,words', [
    (['raod'], "no class 'raod', did you mean 'road'?"),
    ('synthia16', "no class 'sidewalk'"),
    ([0, 5], 'no class 5; the ids .* 0 to 4'),
    ([-1], 'no class -1'),
    ([0, 'road'], "'road' twice"),
])
def test_mistakes_in_subsets_seen_with_the_dataset(classes, words):
    metric = FieldIoUMetric(class_subsets=dict(mIoU16=classes))
    with pytest.raises(ValueError, match=words) as error:
        Evaluator([metric]).dataset_meta = dict(classes=CLASSES)
    assert 'FieldIoUMetric.class_subsets.mIoU16' in str(error.value)


class Learner(BaseModel):
    """Predicts road everywhere, better (one more row) every iteration."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = 0

    def forward(self, inputs, mode):
        if mode == 'loss':
            self.seen += 1
            return dict(loss=self.weight * 0)
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, 4, 4).long())
        guess = torch.ones(1, 4, 4).long()
        guess[:, :self.seen] = 0
        sample.pred_sem_seg = PixelData(data=guess)
        return [sample]


class Numbers(torch.utils.data.Dataset):
    metainfo = dict(classes=CLASSES)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return dict(inputs=torch.zeros(1))


def runner(work_dir, subsets):
    def loader():
        return dict(dataset=Numbers(), batch_size=1, num_workers=0,
                    sampler=dict(type='InfiniteSampler'))
    return Runner(
        Learner(), str(work_dir), train_dataloader=loader(),
        val_dataloader=dict(loader(), sampler=dict(type='DefaultSampler')),
        train_cfg=dict(by_epoch=False, max_iters=2, val_interval=1),
        val_cfg=dict(),
        val_evaluator=dict(type='FieldIoUMetric', class_subsets=subsets),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=dict(
            type='CheckpointHook', by_epoch=False, interval=10,
            save_last=False, save_best='mIoU16')),
        experiment_name=work_dir.name, default_scope='mmseg')


def test_a_subset_chooses_the_best_checkpoint(tmp_path):
    runner(tmp_path, dict(mIoU16=['road'])).train()
    # 1 of 4 rows is right after the first iteration, 2 after the second.
    assert [p.name for p in tmp_path.glob('*.pth')] == [
        'best_mIoU16_iter_2.pth']


def test_a_misspelt_class_stops_before_training(tmp_path):
    wrong = runner(tmp_path, dict(mIoU16=['raod']))
    with pytest.raises(ValueError, match='class_subsets.mIoU16'):
        wrong.train()
    assert wrong.model.seen == 0


def test_missing_labels_are_named():
    data = samples(number=1)
    del data[0]['gt_sem_seg']
    data[0]['img_path'] = 'city/a.png'
    metric = FieldIoUMetric()
    metric.dataset_meta = dict(classes=CLASSES)
    with pytest.raises(ValueError, match='city/a.png has no labels'):
        metric.process({}, data)
