"""Policies of each modality; each turns a generator into recorded, replayable decisions."""
