_base_ = './sepico-dist_daformer_mit-b5_1xb2-40k_gta2cityscapes-640x640.py'
# A temperature at which the covariance counts and the softmax is none of a
# linear function's.
model = dict(segmentor=dict(auxiliary_head=dict(tau=0.1)))
