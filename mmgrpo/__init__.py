"""mmgrpo: one group-relative optimizer for every policy that makes a sequence of stochastic decisions."""
