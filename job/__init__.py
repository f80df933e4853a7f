"""qlora-job: fine-tune a causal language model with 4-bit QLoRA, unattended."""

__version__ = "0.1.0"
