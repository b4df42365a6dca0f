_base_ = [
    '../_base_/default_runtime.py',
    '../_base_/models/deeplabv3_r101-d8.py',
    '../_base_/schedules/sgd_40k.py',
    '../_base_/datasets/cityscapes_512x1024.py',
]
# Stage 2 of 2: all of the network with cross entropy, from stage 1 on.
load_from = ('work_dirs/label-efficient-cross_deeplabv3_r101-d8_1xb8-40k_'
             'cityscapes-512x512/iter_40000.pth')
model = dict(pretrained=None)
