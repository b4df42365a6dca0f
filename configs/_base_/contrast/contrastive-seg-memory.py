# ContrastiveSeg (Wang et al., ICCV 2021) with its memory: hard and easy
# pixels against the latest pixels and segments of each class.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=256,
        projection=dict(layers=2),
        bank=dict(type='MemoryBank', pixels=5000, segments=5000, number=10),
        sampler=dict(type='HardEasy', max_samples=1024, max_views=100),
        own='positive',
        tau=0.1,
        base_tau=0.07,
        loss_weight=1.,
        start=5000,
        update='after'),
    objective=dict(
        type='Contrast',
        anchors=('source', ),
        bank=('source', ),
        bank_from='student'))
