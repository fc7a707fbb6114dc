"""What `lora-scale train` is made of beside its loop: no verb itself."""
