"""Everything that makes a checkpoint: prepare a corpus, convert published weights, align (stage 1), tune (stage 2)."""
