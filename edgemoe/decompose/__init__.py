"""Write experts as products of thinner matrices: methods factor a layer, ranks say how far.

`edgemoe.decompose.registry` lists the methods; `edgemoe.decompose.decision` puts
ranks into a plan; `edgemoe.decompose.walk` factors one layer after the other when it is
applied.
"""
