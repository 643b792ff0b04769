"""From a heap of images to training data: steps over a Parquet index."""
