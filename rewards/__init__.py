"""Reward functions of each modality; each judges samples and knows nothing of how they were made."""
