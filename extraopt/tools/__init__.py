"""Tools around a run: checkpoints, logits extrapolation, reports of logs, and the `extraopt` command."""
