"""``peftrt finetune``: a Hugging Face model, a file of examples, an adapter."""
