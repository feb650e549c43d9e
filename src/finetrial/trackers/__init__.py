"""One file per tracker: a mirror of finished runs."""
