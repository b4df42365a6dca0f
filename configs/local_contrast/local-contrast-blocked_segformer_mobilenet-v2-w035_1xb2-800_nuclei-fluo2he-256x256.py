_base_ = [
    '../benchmarks/nuclei_fluo2he/source_only.py',
    '../_base_/contrast/local-contrast.py',
]
# Stage 1 of 2: contrast alone. Each tile of 32 x 32 positions of the map at
# stride 4 by itself.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, num_classes=_base_.pair.num_classes,
            in_channels=64, bank=dict(
                type='BatchBank', scope='block', block_size=32,
                skip_classes=(0, ), chunk_size=1024),
            sampler=dict(type='PerClassRandom', number=256, scope='image'))),
    objectives=dict(_delete_=True, contrast=_base_.contrast.objective))
