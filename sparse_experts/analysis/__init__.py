"""What a researcher measures on trained models."""
