# ProCA (Jiang et al., ECCV 2022): features, and logits, against the running
# mean of each class over both domains, scaled to length 1.
contrast_head = dict(
    type='ContrastHead',
    channels=2048,
    projection=dict(layers=0),
    normalize='anchors',
    bank=dict(type='PrototypeBank', clock='cumulative', normalize=True),
    own='energy',
    tau=50.,
    loss_weight=1.)
contrast = dict(
    head=contrast_head,
    logits_head=dict(contrast_head, features='logits'),
    objective=dict(
        type='Contrast',
        anchors=('source', 'target'),
        bank=('target', 'source'),
        bank_from='student',
        pseudo_labels=dict(target='target')))
