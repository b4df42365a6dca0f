_base_ = [
    '../benchmarks/nuclei_fluo2he/source_only.py',
    '../_base_/contrast/local-contrast.py',
]
# Stage 1 of 2: contrast alone. 128 pixels of each class and image of the map
# at stride 4, drawn in each iteration.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, num_classes=_base_.pair.num_classes,
            in_channels=64, sampler=dict(
                type='PerClassRandom', number=128, scope='image'))),
    objectives=dict(_delete_=True, contrast=_base_.contrast.objective))
