# CLUDA (Vayyat et al., 2022): contrast of what the decode head classifies, all
# pixels of the batch with each other, from the first iteration on. On HRDA
# between context and detail too.
cluda = dict(
    type='ResolutionContrast',
    views=('source', 'mixed_strong'),
    size=65,
    tau=1.0,
    weight=1.0)
