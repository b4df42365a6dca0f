"""A mistake is shown as one sentence."""

import pytest

from mmseg_contrast.engine.mistakes import one_sentence, sentence


def test_wrapping_is_taken_off():
    worker = ValueError(
        'Caught ValueError in DataLoader worker process 1.\n'
        'Original Traceback (most recent call last):\n  File "x.py"\n'
        'OSError: bad\n\nThe above exception ...\n\n'
        "ValueError: stream 'target': cannot read the image a.png\n")
    assert sentence(worker) == "stream 'target': cannot read the image a.png"
    registry = ValueError(
        'class `UDASegmentor` in mmseg_contrast/adaptation/segmentor.py: '
        'model.objectives is empty')
    assert sentence(registry) == 'model.objectives is empty'
    assert sentence(ValueError('see my.py: line 3')) == 'see my.py: line 3'


def test_only_mistakes_are_caught(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop, one_sentence():
        raise ValueError('model.x is wrong')
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith('error: model.x is wrong\n')
    with pytest.raises(RuntimeError), one_sentence():
        raise RuntimeError
    monkeypatch.setenv('MMSEG_CONTRAST_DEBUG', '1')
    with pytest.raises(ValueError), one_sentence():
        raise ValueError('model.x is wrong')
