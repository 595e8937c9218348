"""Evaluation of a checkpoint: one benchmark task a file, metrics, baselines and the report."""
