_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
# Ablation: DACS's faster teacher.
model = dict(teachers=dict(ema=dict(alpha=0.99)))
