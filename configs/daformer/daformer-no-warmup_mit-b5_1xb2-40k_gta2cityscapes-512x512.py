_base_ = './daformer_mit-b5_1xb2-40k_gta2cityscapes-512x512.py'
# Ablation: no warm-up. The published one also let the backbone's rate rise to
# 1e-4 (min_lr of the schedule above the base rate); this one does not.
param_scheduler = [
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end=40001,
         by_epoch=False),
]
