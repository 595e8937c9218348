"""scMMGPT: one language model for single cells and text."""
