"""What a server serves: the artifact, the names of its models, the folder that it came from."""
