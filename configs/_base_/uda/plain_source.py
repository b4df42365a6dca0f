# Training on the source alone: the lower bound that papers report.
uda = dict(objectives=dict(source=dict(
    type='Segmentation', view='source', accuracy_interval=50)))
