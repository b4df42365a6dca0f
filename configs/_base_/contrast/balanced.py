# Our own mixture, chosen on camvid2idd's val_select (configs/benchmarks):
# class-balanced anchors of source and mixed images, which the student sees
# anyway, against prototypes that follow the student.
contrast = dict(
    head=dict(
        type='ContrastHead',
        channels=64,
        projection=dict(layers=2),
        bank=dict(type='PrototypeBank', clock='ema', new_weight=0.1),
        sampler=dict(type='PerClassRandom', number=128),
        label_rule='ratio',
        own='energy',
        tau=0.1,
        loss_weight=0.5,
        start=100),
    objective=dict(
        type='Contrast',
        anchors=('source', 'mixed_strong'),
        bank=('source', ),
        bank_from='student'))
