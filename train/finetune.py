"""Fine-tune for your own labelled cells, with many labels or few.

```
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --group_key donor --output_dir DIR
python -m scmmgpt.train finetune --adata cells.h5ad --label_key cell_type --checkpoint ALIGNED --output_dir DIR
scmmgpt annotate new_cells.h5ad --model DIR --output annotated.h5ad
```

Three steps:

1. **Fit the profile readout** (`readout`). A multinomial logistic regression reads the square root of every gene's
   share of the cell, and its weights are turned into the space that cells and texts share: a cell becomes a mixture
   of the texts of the labels that it resembles. So a label that was never trained can be given as a text. The model
   is linear because a regression on the whole transcriptome is hard to beat with a few thousand labelled cells. The
   square root keeps the variance of counts even and gives every cell the same length (Hellinger distance). Held-out
   cells choose the strength of the regression; with `--group_key` these are cells of other donors or batches.
2. **Take gradient steps** on the whole model: cell model, Q-Former, readout. Training stops when the validation loss
   stops to fall, and the weights with the lowest one stay, which may be those of step 1.
3. **Refit the readout** with the held-out cells, at the same strength. The temperature of `annotate` is the one that
   fits the held-out cells best, and was chosen before the refit.

The cell projection of a new model starts at zero, so its queries contribute nothing and cells lie where the readout
puts them; no gradient step is taken by default. From a checkpoint the readout is added to the projected queries, in
the proportion that fits the held-out cells best. With `--shots` nothing is held out, and the strength is the default.
Cells without a label help where labels are few: see `readout.fit_spread_regression`. `finetune.json` in the output
records what was tried and how it scored.
"""
