"""The valid region goes through the pipeline with its pixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform

from datasets_common import files_pipeline, folder, streets, write_folder
from mmseg_contrast.datasets import MarkValidRegion, StreamDataset


class Stamp(BaseTransform):
    """Draws the region into the image, as an independent witness."""

    def transform(self, results):
        results['img'] = np.repeat(
            results['valid_region'][..., None] * 255, 3, axis=2)
        return results


def target(root, *steps) -> StreamDataset:
    return StreamDataset(dict(target=dict(
        labelled=False, dataset=folder(
            root, files_pipeline(*steps, pack='PackStreamInputs')))))


def test_margins():
    image = np.zeros((20, 40, 3), np.uint8)
    region = MarkValidRegion(top=2, bottom=0.25, left=0.1, right=3).transform(
        dict(img=image))['valid_region']
    want = np.zeros((20, 40), np.uint8)
    want[2:15, 4:37] = 1
    assert np.array_equal(region, want) and region.dtype == np.uint8


@pytest.mark.parametrize('margin', [-1, 1.5, 1.0, 2.0])
def test_bad_margins(margin):
    with pytest.raises(ValueError, match='MarkValidRegion.left'):
        MarkValidRegion(left=margin)


def test_margins_that_leave_nothing():
    with pytest.raises(ValueError, match='leave nothing'):
        MarkValidRegion(top=10, bottom=10).transform(
            dict(img=np.zeros((20, 40, 3), np.uint8)))


def test_resize_crop_flip(tmp_path):
    """Against the same operations done directly."""
    root = write_folder(tmp_path / 'a', 3)
    seen = []

    class Spy(BaseTransform):

        def transform(self, results):
            seen.append(results['flip'])
            return results

    dataset = target(
        root, dict(type='MarkValidRegion', top=3, right=5),
        dict(type='Resize', scale=(48, 36)), Stamp(),
        dict(type='RandomCrop', crop_size=(20, 30)),
        dict(type='RandomFlip', prob=0.5), Spy())
    seen.clear()
    whole = np.zeros((24, 32), np.uint8)
    whole[3:, :27] = 1
    whole = cv2.resize(whole, (48, 36), interpolation=cv2.INTER_NEAREST)
    crops = {}
    for y in range(17):
        for x in range(19):
            crop = whole[y:y + 20, x:x + 30]
            crops[crop.tobytes()] = False
            crops.setdefault(crop[:, ::-1].tobytes(), True)
    for p in range(12):
        item = dataset[p]
        region = item['data_samples']['target'].valid_region.data
        assert region.shape == (1, 20, 30) and region.dtype == torch.uint8
        assert region.numpy()[0].tobytes() in crops
        # the very pixels of the image
        assert torch.equal(region[0] * 255, item['inputs']['target'][0])
    assert set(seen) == {True, False}


@pytest.mark.parametrize('flip', [0.0, 1.0])
def test_padding_is_not_valid(tmp_path, flip):
    dataset = target(
        write_folder(tmp_path / 'a', 2), dict(type='MarkValidRegion', left=2),
        Stamp(), dict(type='Pad', size=(40, 30)),
        dict(type='RandomFlip', prob=flip))
    item = dataset[0]
    region = item['data_samples']['target'].valid_region.data[0]
    want = torch.zeros(30, 40, dtype=torch.uint8)
    want[:24, 2:32] = 1
    assert torch.equal(region, want.flip(1) if flip else want)
    assert torch.equal(region * 255, item['inputs']['target'][0])


def test_wrong_pack_is_refused(tmp_path):
    config = folder(write_folder(tmp_path / 'a'),
                    files_pipeline(dict(type='MarkValidRegion')))
    with pytest.raises(ValueError, match='PackStreamInputs'):
        StreamDataset(dict(target=dict(labelled=False, dataset=config)))


def test_without_mark_there_is_no_field():
    dataset = StreamDataset(dict(source=dict(dataset=streets('source', 2))))
    assert 'valid_region' not in dataset[0]['data_samples']['source']
