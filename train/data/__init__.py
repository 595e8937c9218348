r"""From files of cells to batches of a training step.

```
 .h5ad, .h5, .mtx, Census        a user's cells and annotations
      |  AnnData: X (n_cells, n_genes), obs, var
      v  prepare.py <- sources.py, splits.py, gene_tables.py
 corpus/data/*.parquet           corpus.py: a row a cell; gene_ids, counts as lists of uint16, annotations as strings
      |  cache.py: the same rows as Arrow files, which stream faster (optional)
      v
 BlockReader                     blocks.py: row group -> Cells and annotations
      |                            Cells: indptr int64 (n_cells + 1,), gene_ids uint16 (nnz,), counts (nnz,) uint16
      |                            or float32, cell_ids uint64 (n_cells,); obs: {column: str (n_cells,)}
      |      CellOrder           order.py: numbers alone. Sizes of row groups and lengths of cells in; out, for an
      |          |               epoch, a rank and a step: which rows go to which place of which batch
      v          v
 CellStream                      stream.py: pools of 8,192 shuffled cells, read ahead in threads
      |  Cells and obs of one batch, and the epoch of their random draws
      v  collate.py <- captions.py <- ontology.py; instructions.py puts conversations in place of some cells
 BatchDataset                    batches.py: a `datasets.IterableDataset` of which one example is one finished batch,
      |                          made ahead in threads
      |  gene_ids int64 (B, G), expression float32 (B, G), cell_attention_mask int64 (B, G),
      v  input_ids int64 (B, T), attention_mask int64 (B, T), ...
 Trainer                         ../trainer.py: `make_datasets`, and where a resumed run goes on
```

Each part can be used without those below it. Nothing here imports the rest of `train`.
"""
