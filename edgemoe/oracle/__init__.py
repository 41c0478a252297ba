"""What a model's layers answer when experts are missing: for methods that search.

Sums over tokens tell how much an expert is used. How far a layer's output moves when a set of
experts goes is no sum over experts: the router chooses others in their place, and gates that
are renormalised change. These modules run layers on the tokens that calibration read.
"""
