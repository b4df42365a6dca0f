_base_ = [
    '../daformer/daformer_mit-b5_1xb2-40k_cityscapes2acdc-512x512.py',
    '../_base_/contrast/cluda.py',
]
model = dict(objectives=dict(cluda=_base_.cluda))
