"""What single families of multimodal language models do otherwise than most: one file a family, found by name."""
