"""Corpora that tests write."""

from scmmgpt.train.data.corpus_writer import CorpusWriter


def write_corpus(path, vocabulary, cells_by_split, *, cells_per_shard=100_000, row_group_size=512, **manifest_fields):
    """Write a corpus of {split: (cells, {obs column: values})}, cells in the given order; returns its manifest."""
    writer = CorpusWriter(path, vocabulary, row_group_size=row_group_size)
    for split, (cells, obs) in cells_by_split.items():
        starts = range(0, len(cells), cells_per_shard)
        for index, start in enumerate(starts):
            rows = slice(start, start + cells_per_shard)
            part = {name: values[rows] for name, values in obs.items()}
            writer.write_shard(split, index, len(starts), cells[rows], part)
    return writer.finish(**manifest_fields)
