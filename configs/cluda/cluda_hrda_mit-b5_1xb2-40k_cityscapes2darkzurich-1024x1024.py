_base_ = [
    '../hrda/hrda_mit-b5_1xb2-40k_cityscapes2darkzurich-1024x1024.py',
    '../_base_/contrast/cluda-hrda.py',
]
model = dict(
    views=_base_.cluda_views, objectives=dict(cluda=_base_.cluda))
