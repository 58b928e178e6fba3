"""Scores of sampled videos: what moving shapes show, Fréchet and kernel distance of I3D features."""
