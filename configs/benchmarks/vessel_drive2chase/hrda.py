_base_ = './dacs.py'
# The same head at two resolutions; the attention is as wide as the head.
model = dict(
    segmentor=dict(
        type='HRDASegmentor',
        decode_head=dict(
            _delete_=True,
            type='HRDAHead',
            head=_base_.model.segmentor.decode_head,
            attention=dict(channels=64, embed_dims=64)),
        detail_size=(128, 128)))
