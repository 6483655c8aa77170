"""Images of classes: sources, files, augmentation and records."""
