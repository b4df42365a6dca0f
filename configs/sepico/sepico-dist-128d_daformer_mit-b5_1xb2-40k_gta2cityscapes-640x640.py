_base_ = './sepico-dist_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640.py'
# A cheaper projection: 128 numbers for each pixel, instead of 512, from half
# of the hidden ones.
model = dict(segmentor=dict(auxiliary_head=dict(
    channels=128, projection=dict(hidden_channels=128))))
