# DAFormer's schedule. mmcv multiplied a poly decay over all 40k iterations
# with the warm-up, so the highest rate is 5.775e-5. Both schedulers from the
# start, and these two ends, give the same to 7 digits; a warm-up followed by
# a decay would be 3.9% higher all the way.
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='UDAOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # The rule of a matching key wins: norms of the head keep their decay.
    paramwise_cfg=dict(
        norm_decay_mult=0.0, custom_keys=dict(head=dict(lr_mult=10.0))))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1501,
         by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=0, end=40001,
         by_epoch=False),
]
