"""Drop-ins: the contrastive losses of other libraries, by their names, signatures, defaults and values.

One module a library, which imports nothing of it: `lightly`, `pytorch_metric_learning`, `solo_learn`, `sup_contrast`,
`info_nce`, `open_clip`, `sentence_transformers`, `simclr`, `torchmultimodal`. docs/migration.md has a before and after
for each, and what differs. What they share: half-precision embeddings give a float32 loss, no loss is NaN where the
library's divides zero by zero, and bad input is an error that names the argument.
"""
