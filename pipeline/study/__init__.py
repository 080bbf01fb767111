"""Train, tune, evaluate and compare variants of one model with several seeds, on one machine or on Slurm."""
