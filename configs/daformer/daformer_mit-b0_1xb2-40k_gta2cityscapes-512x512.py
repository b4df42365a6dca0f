_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
pretrained = ('https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/'
              'segformer/mit_b0_20220624-7e0fe6dd.pth')
model = dict(segmentor=dict(
    backbone=dict(
        embed_dims=32, num_layers=(2, 2, 2, 2),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
))
