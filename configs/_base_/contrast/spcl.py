# SPCL (Xie et al., 2021): features as they are against the means of the
# latest batch. Source pixels count where the student has them right, target
# pixels where the pseudo-label is sure.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=2048,
        projection=dict(layers=0),
        bank=dict(type='PrototypeBank', clock='ema', new_weight=0.9),
        own='energy',
        tau=100.,
        loss_weight=1.),
    objective=dict(
        type='Contrast',
        anchors=('source', 'target'),
        bank=('source', ),
        bank_from='student',
        correct_only=('source', ),
        pseudo_labels=dict(target='target'),
        min_confidence=0.9))
