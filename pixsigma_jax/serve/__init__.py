"""A server of images: OpenAI's Images API over one queue of batches."""
