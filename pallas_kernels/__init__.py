"""Kernels for the hot paths: leaves that import JAX alone, take arrays and return arrays.

`over_time` carries a matrix from chunk to chunk, a `walk` with the arithmetic of `within_chunk`; `by_token` a state of
each channel from token to token, in `channel_programs` over `channel_blocks`; both in `splits` of time, where sequences
are few. `over_pairs` folds blocks of keys for blocks of queries; `one_token` is a decoding step of a matrix. What is
computed on the way is a plain function that the caller gives, and `jaxseq.ops`, their only caller, gives the one that
it defines an op by: the form `impl="pallas"`. On a TPU Mosaic compiles them, on NVIDIA's GPUs Triton, or Mosaic what it
can (`mosaic_gpu`); a CPU interprets the kernels of a TPU. How much a program works on at once stands in `tiles`.
"""
