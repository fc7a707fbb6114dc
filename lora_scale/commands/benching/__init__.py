"""`lora-scale bench`: the cases, how one is run, and what is made of the record."""
