"""Cluster instruction data by LoRA gradients, train one expert per cluster, and route each prompt to one."""

__version__ = "0.1.0"
