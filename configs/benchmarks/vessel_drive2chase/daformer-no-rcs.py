_base_ = './daformer.py'
# Ablation: images of the source are drawn uniformly.
train_dataloader = dict(
    dataset=dict(streams=dict(source=dict(rare_class=None))))
