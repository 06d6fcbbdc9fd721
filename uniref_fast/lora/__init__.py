"""Files of LoRA adapters: the formats that circulate, their conversion, and a description of a file."""
