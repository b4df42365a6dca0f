_base_ = [
    '../daformer/daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py',
    '../_base_/uda/mic-target.py',
]
mic = _base_.mic
# Half of the resolution, half of the block.
mic.views.masked.block = 32
model = dict(views=mic.views, objectives=mic.objectives)
