# Supervised local contrast (Hu et al., MICCAI 2021): pixels of two views of
# the batch against each other. The background is a key and no anchor.
contrast = dict(
    head=dict(
        type='ContrastHead',
        features='decoder',
        channels=64,
        projection=dict(layers=2, norm_cfg=None),
        bank=dict(type='BatchBank', skip_classes=(0, ), chunk_size=1024),
        own='energy',
        tau=0.07,
        loss_weight=1.),
    objective=dict(
        type='Contrast',
        anchors=('source', 'strong'),
        joint=True,
        bank=(),
        pseudo_labels=dict(),
        update_norm=True))
