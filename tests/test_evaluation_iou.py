"""IoU of any field, against mmseg's and an explicit confusion matrix."""

from __future__ import annotations

import math

import pytest
import torch
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from mmseg_contrast.evaluation import FieldIoUMetric

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


def evaluate(metric, data):
    metric.dataset_meta = dict(classes=CLASSES)
    for sample in data:  # several batches
        metric.process({}, [sample])
    return metric.evaluate(len(data))


def loop_iou(data, field):
    """IoU in percent of every class, nan for one that is nowhere."""
    matrix = [[0] * len(CLASSES) for _ in CLASSES]
    for sample in data:
        truth = sample['gt_sem_seg']['data'].flatten().tolist()
        guess = sample[field]['data'].flatten().tolist()
        for t, g in zip(truth, guess, strict=True):
            if t != 255:
                matrix[t][g] += 1
    result = []
    for c in range(len(CLASSES)):
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
