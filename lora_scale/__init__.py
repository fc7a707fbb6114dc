"""LoRA fine-tuning of 100B-scale language models on a frozen, sharded base."""

__version__ = "0.1.0"
