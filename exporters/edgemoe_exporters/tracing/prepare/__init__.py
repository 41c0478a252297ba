"""Make a transformers model traceable: the parts that families spell differently become ops."""
