"""The operations in plain torch: what every kernel is checked against, and what runs where no kernel does.

They are written to be obviously right. Sums are in fp32 (fp64 where the input is fp64) and rounded once at the end.
"""
