"""One file per probe: raw measurements of one trained model."""
