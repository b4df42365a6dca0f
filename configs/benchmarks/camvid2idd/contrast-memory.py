# A variant that was tried: against a memory instead of prototypes.
_base_ = './contrast.py'
model = dict(
    segmentor=dict(
        auxiliary_head=dict(
            bank=dict(
                _delete_=True, type='MemoryBank', pixels=500, segments=500,
                number=10),
            own='positive',
            update='after')))
