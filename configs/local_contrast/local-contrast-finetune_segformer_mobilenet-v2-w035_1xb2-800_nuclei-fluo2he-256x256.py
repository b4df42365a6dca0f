_base_ = '../benchmarks/nuclei_fluo2he/source_only.py'
# Stage 2 of 2: cross entropy, from stage 1 on.
load_from = (
    'work_dirs/local-contrast_segformer_mobilenet-v2-w035_1xb2-800_'
    'nuclei-fluo2he-256x256/iter_800.pth')
model = dict(segmentor=dict(backbone=dict(init_cfg=None)))
