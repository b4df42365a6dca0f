_base_ = [
    '../benchmarks/nuclei_fluo2he/source_only.py',
    '../_base_/contrast/local-contrast.py',
]
# Stage 1 of 2: contrast alone. Each 16th pixel in both directions: all
# positions of the encoder's map at stride 16.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, num_classes=_base_.pair.num_classes,
            features='backbone', in_index=2, in_channels=32,
            label_rule='stride')),
    objectives=dict(_delete_=True, contrast=_base_.contrast.objective))
