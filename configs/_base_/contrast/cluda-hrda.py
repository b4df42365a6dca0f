# CLUDA on HRDA, as published: a head on the context weighs the two losses, and
# on mixed images the detail is taken where the context's prediction is the
# least sure (published: after local_iter 12000).
_base_ = './cluda.py'
cluda = dict(weighter=dict())
cluda_views = dict(
    mixed_augmented=dict(
        type='StrongAugment', view='mixed', jitter_strength=0.2),
    mixed_strong=dict(
        _delete_=True,
        type='UnsureDetail',
        view='mixed_augmented',
        start=12001))
