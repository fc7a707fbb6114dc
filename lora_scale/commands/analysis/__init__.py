"""What `lora-scale analyze` is made of: no verb itself."""
