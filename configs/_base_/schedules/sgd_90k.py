# ProCA's second stage.
_base_ = './sgd_250k.py'
train_cfg = dict(max_iters=90000, val_interval=10000)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=90000,
         by_epoch=False),
]
