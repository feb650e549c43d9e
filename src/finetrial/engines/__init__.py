"""One file per engine: where a run's process lives."""
