_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
pretrained = ('https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/'
              'segformer/mit_b1_20220624-02e5a6a1.pth')
model = dict(segmentor=dict(
    backbone=dict(
        num_layers=(2, 2, 2, 2),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
))
