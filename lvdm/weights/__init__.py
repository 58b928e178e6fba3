"""Weights in and out of files. Gives tensors and plain config dicts, and knows no model class."""
