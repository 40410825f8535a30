"""Image files: found, decoded on a CPU or GPU, cropped."""
