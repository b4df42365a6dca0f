_base_ = ['./dacs.py', '../../_base_/uda/mic-target.py']
mic = _base_.mic
# The published share of the crop: a sixteenth of its side. Colours as in DACS.
mic.views.masked.block = 16
mic.views.target_strong.jitter_strength = 0.25
model = dict(views=mic.views, objectives=mic.objectives)
