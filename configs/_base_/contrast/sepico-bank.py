# SePiCo's BankCL: against the latest 200 batch means of each class
# (Xie et al., TPAMI 2023), filled with the teacher's view of the source.
# tau = 100 is the published value; it makes the softmax linear.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=512,
        projection=dict(layers=2, last_act=True),
        bank=dict(
            type='SegmentQueue',
            length=200,
            segment='batch',
            normalize=False,
            energy='mean'),
        label_rule='ratio',
        min_ratio=0.75,
        own='positive',
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
