"""Kernels for the hot paths: leaves that import JAX alone, take arrays and return arrays.

`jaxseq.ops` is their only caller; there they are the form `impl="pallas"`, checked against `impl="sequential"`.
"""
