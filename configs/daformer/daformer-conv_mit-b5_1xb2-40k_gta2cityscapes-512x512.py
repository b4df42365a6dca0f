_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
# Decoder variant: no context: SegFormer's decoder with 256 channels.
model = dict(segmentor=dict(decode_head=dict(
    fusion=dict(_delete_=True, type='ConvFusion'))))
