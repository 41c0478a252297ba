"""Write a bundle: graphs, weights that tasks share stored once, manifest, tokenizer files."""
