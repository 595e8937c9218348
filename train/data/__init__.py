"""From files of cells to training batches: prepare a corpus, write captions, stream, collate."""
