# Relation contrast (ReKD, Zheng et al., AAAI 2022), re-derived from the
# paper's equations: positives are the pixels that the teacher finds nearest.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=256,
        projection=dict(layers=2),
        bank=dict(type='BatchBank', rule='teacher_topk', k=5),
        sampler=dict(type='PerClassRandom', number=64),
        own='positive',
        reduce_positives='lse',
        tau=0.1,
        loss_weight=0.1),
    objective=dict(
        type='Contrast', anchors=('source', ), bank=(), teacher='ema'))
