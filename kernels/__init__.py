"""Triton kernels, each file a kernel, its configurations and its launcher; import path ``peftrt.kernels``.

They register nothing: the operations in ``peftrt.ops`` import them when a call needs one, since that imports Triton.
Names: ``p_`` pointer, ``i_`` index, ``o_`` offset, ``m_`` mask, ``b_`` block of values.
"""
