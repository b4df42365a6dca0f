# SePiCo's DistCL: against a normal distribution for each class
# (Xie et al., TPAMI 2023), filled with the teacher's view of the source.
# tau = 100 is the published value; it makes the softmax linear.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=512,
        projection=dict(layers=2, last_act=True),
        bank=dict(type='GaussianBank', clock='cumulative'),
        label_rule='ratio',
        min_ratio=0.75,
        own='energy',
        tau=100.,
        loss_weight=1.,
        start=3000),
    objective=dict(
        type='Contrast',
        anchors=('source', 'target'),
        bank=('source', ),
        bank_from='teacher',
        teacher='ema',
        pseudo_labels=dict(target='target')))
