"""Carve a Mixture of Experts out of a dense checkpoint (CMoE, arXiv 2502.04416)."""
