"""`python -m lora_scale`, and what `deepspeed --module lora_scale` starts."""

from lora_scale.cli import main

main()
