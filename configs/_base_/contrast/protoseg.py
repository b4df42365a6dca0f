# ProtoSeg's two losses (Zhou et al., CVPR 2022): ten prototypes of each class,
# to which pixels are assigned by optimal transport. The contrast weighs 0.01,
# the distance to the assigned prototype 0.01 x 0.1.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=256,
        projection=dict(layers=2),
        bank=dict(
            type='PrototypeBank',
            prototypes=10,
            clock='ema',
            new_weight=0.001,
            normalize=True,
            assign='transport',
            iterations=3,
            epsilon=0.05,
            compare='prototype',
            distance_weight=0.1),
        own='energy',
        tau=0.1,
        loss_weight=0.01,
        update='after'))
