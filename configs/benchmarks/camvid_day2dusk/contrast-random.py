# A control: the projection stays as it was drawn.
_base_ = './contrast.py'
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'auxiliary_head.projection': dict(lr_mult=0., decay_mult=0.)
        }))
