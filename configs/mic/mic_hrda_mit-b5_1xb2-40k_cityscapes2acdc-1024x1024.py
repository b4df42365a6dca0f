_base_ = [
    '../hrda/hrda_mit-b5_1xb2-40k_cityscapes2acdc-1024x1024.py',
    '../_base_/uda/mic-halves.py',
]
model = dict(views=_base_.mic.views, objectives=_base_.mic.objectives)
