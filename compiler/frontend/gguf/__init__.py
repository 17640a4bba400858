"""From a GGUF file to a Hugging Face folder: every key and tensor is carried over or refused."""
