_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
# Ablation: images of the source are drawn uniformly.
train_dataloader = dict(
    dataset=dict(streams=dict(source=dict(rare_class=None))))
