# DeepLabV2 as the line of methods from FADA on has it (SPCL, SDCA, ProCA):
# all four dilations, norms as ImageNet left them.
_base_ = './deeplabv2_r101-d8.py'
model = dict(
    backbone=dict(norm_cfg=dict(requires_grad=False), norm_eval=True),
    decode_head=dict(dilations=(6, 12, 18, 24)))
