"""What a run keeps on disk: files that survive, weights and states in them, one run per folder."""
