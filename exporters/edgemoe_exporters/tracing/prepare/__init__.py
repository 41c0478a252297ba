"""Make a transformers model traceable: what families code differently becomes custom ops."""
