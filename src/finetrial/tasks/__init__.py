"""One file per task: where its rows come from, and which head and metric judge them."""
