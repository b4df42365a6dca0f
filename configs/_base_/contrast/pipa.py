# PiPa's pixel loss (Chen et al., ACM MM 2023): ContrastiveSeg's, on the
# source alone and from the first iteration on.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=256,
        projection=dict(layers=2),
        bank=dict(type='BatchBank'),
        sampler=dict(type='HardEasy', max_samples=1024, max_views=100),
        own='positive',
        tau=0.1,
        base_tau=0.07,
        loss_weight=0.1),
    objective=dict(
        type='Contrast', anchors=('source', ), bank=(), bank_from='student'))
