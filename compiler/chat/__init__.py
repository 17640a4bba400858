"""The chat templates of an artifact, as eoracc and as onnxruntime-genai render them."""
