"""Cluster instruction data by LoRA gradients, train one expert per cluster, and route each prompt to one."""

import logging

__version__ = "0.1.0"
# Whenever PEFT is imported on some CPUs, it advises a package that loads kernels over the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
