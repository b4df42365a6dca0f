# SPCL's last stage, SDCA's first and last: twice the rate, half as long.
_base_ = './sgd_250k.py'
train_cfg = dict(max_iters=20000, val_interval=2000)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=0, end=31250,
         by_epoch=False),
]
