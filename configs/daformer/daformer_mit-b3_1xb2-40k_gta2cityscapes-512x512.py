_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
pretrained = ('https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/'
              'segformer/mit_b3_20220624-13b1141c.pth')
model = dict(segmentor=dict(
    backbone=dict(
        num_layers=(3, 4, 18, 3),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
))
