# SDCA (Li et al., 2021): features, and logits, against a normal distribution
# for each class. The published loss also scales each row of variances to
# length 1, by which these lose their size; here they are those of the scaled
# keys.
contrast_head = dict(
    type='ContrastHead',
    channels=2048,
    projection=dict(layers=0),
    normalize='anchors',
    bank=dict(type='GaussianBank', clock='cumulative', normalize='mean'),
    own='energy',
    tau=100.,
    loss_weight=1.)
contrast = dict(
    head=contrast_head,
    logits_head=dict(contrast_head, features='logits'),
    objective=dict(
        type='Contrast',
        anchors=('source', 'target'),
        bank=('source', ),
        bank_from='student',
        pseudo_labels=dict(target='target'),
        min_confidence=0.9))
