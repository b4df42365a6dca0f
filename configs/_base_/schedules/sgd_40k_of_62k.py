# SPCL's and SDCA's second stage: a decay over 62,500 iterations, stopped at
# 40,000.
_base_ = './sgd_250k.py'
train_cfg = dict(max_iters=40000, val_interval=4000)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=62500,
         by_epoch=False),
]
