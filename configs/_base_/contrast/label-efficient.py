# Label-efficient contrastive pretraining (Zhao et al., ICCV 2021), re-derived
# from the paper's equations: pixels of an image against all pixels of its
# distorted view.
contrast = dict(
    head=dict(
        type='ContrastHead',
        features='decoder',
        channels=256,
        projection=dict(layers=3, norm_cfg=None),
        bank=dict(type='BatchBank', scope='image', chunk_size=1024),
        sampler=dict(type='PerClassRandom', number=32, scope='image'),
        own='energy',
        tau=0.07,
        loss_weight=1.),
    objective=dict(
        type='Contrast',
        anchors=('source', ),
        keys='strong',
        bank=(),
        pseudo_labels=dict(),
        update_norm=True))
