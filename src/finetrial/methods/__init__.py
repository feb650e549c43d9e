"""One file per method: what is trained, and nothing else."""
