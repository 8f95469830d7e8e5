"""What the papers of the optimizer's components claim, each on a task that is small enough to be run over many seeds."""
