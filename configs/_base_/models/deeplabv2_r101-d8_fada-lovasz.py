# The same, with the Lovasz loss that SDCA and ProCA add to cross entropy.
_base_ = './deeplabv2_r101-d8_fada.py'
model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            dict(type='LovaszLoss', reduction='none', loss_weight=0.75),
        ]))
