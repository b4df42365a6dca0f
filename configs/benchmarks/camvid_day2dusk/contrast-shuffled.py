# A control: anchors get each other's labels.
_base_ = './contrast.py'
model = dict(objectives=dict(contrast=dict(shuffle=True)))
