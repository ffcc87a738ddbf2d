"""Microbenchmarks of the kernels' stems: points, work, checks, costs and clocks."""
