# A control: anchors get each other's labels.
_base_ = './sepico-proto.py'
model = dict(objectives=dict(contrast=dict(shuffle=True)))
