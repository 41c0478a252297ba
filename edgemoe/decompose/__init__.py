"""Write experts as products of thinner matrices."""
