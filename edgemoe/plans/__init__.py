"""What is to be done to a model, as a file: the experts that stay, and their ranks.

Importing this package costs no torch.
"""
