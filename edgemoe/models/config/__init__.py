"""What a checkpoint's small files say: its configuration, notes, tokenizer and companions."""
