"""The place of kernels for the hot paths; it holds none yet.

They will be leaves that import JAX alone, take arrays and return arrays. `jaxseq.ops` will be their only caller, as the
form `impl="pallas"`, checked against `impl="sequential"`.
"""
