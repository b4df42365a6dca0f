"""What a Segmentation objective logs besides its losses."""

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.losses import accuracy

from helpers import batch, build, dacs_parts, run, tiny_student


def with_accuracy(interval, student=None, **options):
    source = dict(type='Segmentation', view='source',
                  accuracy_interval=interval, **options)
    return build(student, **dacs_parts(objectives=dict(source=source)))


@pytest.mark.parametrize('options', [
    dict(), dict(align_corners=True),
    dict(out_channels=1, num_classes=2, threshold=0.3,
         loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))],
    ids=str)
def test_accuracy_is_that_of_mmseg(options):
    model = with_accuracy(1, tiny_student(**options), weight=0.3)
    model.keep_step = True
    losses = run(model, batch(num_classes=model.num_classes))
    step = model.last_step
    labels = step.view('source').labels
    assert (labels == 255).any()
    logits = F.interpolate(
        step.student('source').logits, labels.shape[-2:], mode='bilinear',
        align_corners=options.get('align_corners', False))
    if logits.shape[1] == 1:
        logits = torch.cat([-logits, logits], 1)
    wanted = accuracy(logits, labels, ignore_index=255)
    # Not weighted, as it is no loss.
    assert float(losses['source.decode.acc_seg']) == pytest.approx(
        float(wanted), rel=1e-6)
    assert 0 < wanted < 100


def test_accuracy_is_computed_in_its_iterations_only():
    model = with_accuracy(3)
    found = ['source.decode.acc_seg' in run(model, batch()) for _ in range(7)]
    assert found == [False, False, True, False, False, True, False]
    assert not any('acc_seg' in key for key in run(with_accuracy(0), batch()))
    with pytest.raises(ValueError, match='source.accuracy_interval'):
        with_accuracy(-1)


def test_accuracy_without_a_labelled_pixel_is_0():
    model, data = with_accuracy(1), batch()
    for one in data['data_samples']['source']:
        one.gt_sem_seg.data.fill_(255)
    assert float(run(model, data)['source.decode.acc_seg']) == 0
