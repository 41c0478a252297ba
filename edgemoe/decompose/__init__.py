"""Write experts as products of thinner matrices: methods factor a layer, ranks say how far.

:mod:`edgemoe.decompose.registry` lists the methods; :mod:`edgemoe.decompose.decision` puts
ranks into a plan; :mod:`edgemoe.decompose.walk` factors one layer after the other when it is
applied.
"""
