"""From a checkpoint (Hugging Face folder, hub id, GGUF) to the graph."""
