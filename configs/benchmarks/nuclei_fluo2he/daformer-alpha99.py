_base_ = './daformer.py'
# Ablation: DACS's faster teacher.
model = dict(teachers=dict(ema=dict(alpha=0.99)))
