_base_ = ['./dacs.py', '../../_base_/contrast/contrastive-seg-memory.py']
# The memory is as long for its iterations as the published one.
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            _base_.contrast.head, in_channels=[8, 16, 32, 112],
            in_index=[0, 1, 2, 3], input_transform='resize_concat',
            num_classes=_base_.pair.num_classes, channels=64,
            bank=dict(type='MemoryBank', pixels=500, segments=500, number=10),
            start=100)),
    objectives=dict(contrast=_base_.contrast.objective))
