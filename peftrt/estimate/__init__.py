"""``peftrt estimate``: what a fine-tuning run will take of the device's memory, before any weight is loaded."""
