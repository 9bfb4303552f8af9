"""The two towers of CLIP, their configurations and presets, and the weights of other projects."""
