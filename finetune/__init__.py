"""Patches to adapted backbones: LoRA and full fine-tuning, all folds at once."""
