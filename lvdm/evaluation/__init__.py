"""Scores of sampled videos: Fréchet and kernel distance of I3D features."""
