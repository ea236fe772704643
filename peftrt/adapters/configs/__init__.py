"""The configurations of all methods: HF peft's field names, every field checked, to and from peft's JSON."""
