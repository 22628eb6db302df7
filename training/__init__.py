"""What any training run needs."""
