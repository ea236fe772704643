"""``peftrt compare``: the ways to fine-tune a model side by side, each training in a process of its own."""
