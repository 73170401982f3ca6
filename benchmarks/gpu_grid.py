"""The grid of the GPU benchmark and of its static report."""

BATCHES = (1, 8, 64, 256)
LENGTHS = (1024, 8192, 65536, 262144)
HEADS = ((32, 32), (32, 8), (64, 8), (16, 1))
DIMS = (64, 128, 256)
BLOCKS = (0, 16, 128)
DTYPES = ("bfloat16", "int8")
