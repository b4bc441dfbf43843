"""FID and its relatives, of folders and during training."""
