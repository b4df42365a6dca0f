# Masked images leave no trace in the batch norms' running statistics, with
# which the student is tested: it never meets a hidden block there.
_base_ = './mic.py'
model = dict(objectives=dict(masked=dict(update_norm=False)))
