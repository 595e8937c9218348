r"""From files of cells to batches of a training step: classes with their files, and what passes between them.

```
 FileSource, CensusSource        sources.py: .h5ad, .h5 and .mtx files, or the Census
      |   AnnData: X (n_cells, n_genes), obs, var
      v
 CorpusBuilder                   build.py, run by prepare.py; with gene_tables.py and splits.py
      |   corpus/data/*.parquet, opened by corpus.py `Corpus`. One row is one cell: cell_id int64, n_genes uint16,
      |   gene_ids list<uint16>, counts list<uint16> or list<float32>, total_counts float32, annotations string
      |   (optional: corpus/cache/*.arrow, the same rows in files that stream faster, by cache.py `write_cache`)
      v
 BlockReader                     blocks.py: decodes one row group ("block") at a time
      |                          (`RowReader` reads blocks of a map-style dataset instead; `StreamedCells` of
      |                          streamed.py yields batches of a streamed dataset in the order of the dataset)
      |   Cells: indptr int64 (n_cells + 1,), gene_ids uint16 (nnz,), counts uint16 or float32 (nnz,),
      |          cell_ids uint64 (n_cells,), total_counts float32 (n_cells,)
      |   obs: {annotation: str (n_cells,)}
      |
      |      CellOrder           order.py: decides which cells make up which batch, from sizes and lengths alone
      |          |   Pool: block, rows (n,) and places (n,) of each piece; bounds of the batches int64 (n_batches, 2)
      v          v
 CellStream.batches              stream.py: copies some 8,000 cells at a time to their places, and slices batches
      |   Cells of one batch (B cells), obs {annotation: str (B,)}, and the epoch
      v
 BatchDataset                    batches.py: a `datasets.IterableDataset`; calls the collator ahead, in a thread
      |                          instructions.py: `InstructionBatches` puts conversations in place of some cells
      v
 AlignmentCollator, TuningCollator    collate.py: stages 1 and 2; `CaptionSampler` (captions.py) draws the texts
      |   {name: tensor} of one batch, with G tokens in the longest cell and T in the longest text:
      |   gene_ids int64 (B, G), expression float32 (B, G), cell_attention_mask int64 (B, G),
      |   qformer_input_ids int64 (B, T) in stage 1; input_ids, labels int64 (B, T) in stage 2; ...
      v
 StreamTrainer                   ../trainer.py: `make_datasets` builds the chain from `CellStream` on
```

Each part works without the parts below it. Nothing here imports the rest of `train`.
"""
