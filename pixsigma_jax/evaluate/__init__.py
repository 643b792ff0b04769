"""How good the pictures are: readers and metrics over samples, each with its source."""
