"""The kernel for Hopper GPUs (H100, H200): compute capability 9.0.

support.py  what the kernel can read, and why not the rest
tuning.py   tile sizes per device and shape class, from tuning.json
plan.py     every static number of one launch
kernel.py   the kernel body
launch.py   the arrays around one launch, and the merge of its splits
"""
