"""Ahead-of-time compilation for TPU topologies: memory, FLOPs and traffic of a program."""
