"""Images with their texts: sources, generated scenes and records."""
