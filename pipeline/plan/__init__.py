"""What a run will hold, send and take, from its configuration alone: no weights, no GPU, no process group."""
