"""What every stem of kernels uses. Only the files named triton_* import Triton."""
