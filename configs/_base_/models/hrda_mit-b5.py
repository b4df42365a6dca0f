# HRDA's network: DAFormer's on the whole crop at half the resolution and on a
# quarter of it at the full one. In tests crops of 1024 x 1024 slide.
_base_ = './daformer_mit-b5.py'
data_preprocessor = dict(size=(1024, 1024))
model = dict(
    type='HRDASegmentor',
    data_preprocessor=data_preprocessor,
    decode_head=dict(
        _delete_=True,
        type='HRDAHead',
        head=_base_.model.decode_head,
        classwise=True,
        detail_weight=0.1),
    detail_size=(512, 512),
    factor=2,
    divisor=8,
    # As published: the detail never touches the lower and right border.
    include_last=False,
    # Of the teacher: 9 windows for a crop.
    overlap=True,
    test_cfg=dict(
        mode='slide', crop_size=(1024, 1024), stride=(512, 512), batched=6))
